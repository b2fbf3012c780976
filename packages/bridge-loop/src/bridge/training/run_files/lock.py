"""The lock of a run directory: one run at a time trains there.

It is a POSIX record lock (``fcntl.lockf``) on the file run.lock of the directory. The kernel
releases it when the process ends, however it ends, so a process that was killed leaves no lock. NFS
(version 4, or 3 with its lock daemon), Lustre mounted with ``flock`` and GPFS carry such locks to
other machines; when a machine is lost, the server frees its locks after the lease time. ``flock``
is local to one machine on some of these, and a lease with a heartbeat would have to guess when a
silent process is dead.

Two bytes of the file are locked, whatever their content:

- byte 0, exclusively, by the one process that owns the directory: the launcher of local ranks,
  else rank 0;
- byte 1, shared, by every other rank. A rank may outlive the owner for some seconds, and until then
  it may still write: whoever locks byte 0 next waits for it, then fails.

The text in the file says which process on which host is the owner, for messages alone. It is
removed with the lock. POSIX locks belong to the process: a forked one has none of them, and they
are lost when the process closes the file through any descriptor. So only this module opens it.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, override

from bridge.training.durable_files import make_directory
from bridge.training.run_files.directory import (
    RunDirectory,
    reject_non_directory,
    writing_run_files,
)
from bridge.training.usage_error import UsageError

SECONDS_FOR_RANKS_TO_END = 3.0
"""For the ranks of a launcher that was killed: they check every second whether it lives."""

SECONDS_FOR_FILE_TO_BE_LEFT = 1.0
"""For the other ranks to close the file when the run has ended on the owner."""

_OWNER_BYTE, _RANKS_BYTE = 0, 1
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_POLL_SECONDS = 0.05
_ATTEMPTS = 100


@dataclass(frozen=True)
class Owner:
    """The process that owns a run directory."""

    process: int
    host: str
    since: str
    """The time at which it locked the directory, local time."""

    @classmethod
    def this_process(cls) -> Self:
        """Return this process, as the owner from now on."""
        moment = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        return cls(os.getpid(), socket.gethostname(), moment)

    @override
    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} (since {self.since})"


@dataclass
class _OwnLock:
    """A directory that this process has locked, or may use as its launcher has."""

    process: int
    """The process that made the entry: a forked one has its parent's table and not its locks."""
    in_use: bool = False


_own_locks: dict[str, _OwnLock] = {}
_table = threading.Lock()


@contextlib.contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Own a run directory in this block; it is made if it is not there.

    Within `directory_lock` or `launcher_lock` of the same process it takes over their lock. A
    directory that was made for the lock and is empty at the end is removed.

    Raises:
        UsageError: Another process or thread trains there, or the directory cannot be written.
    """
    key = os.path.realpath(path)
    with _table:
        outer = _own_locks.get(key)
        if outer is not None and outer.process == os.getpid():
            if outer.in_use:
                raise _in_use(path, Owner.this_process())
            outer.in_use = True
        else:
            outer = None
    if outer is not None:
        try:
            yield
        finally:
            outer.in_use = False
        return
    with _lock_of(path), _registered(key):
        yield


@contextlib.contextmanager
def launcher_lock(path: Path) -> Iterator[None]:
    """Let this rank use the directory that its launcher owns.

    Raises:
        UsageError: Another process has locked it since the launcher has ended.
    """
    with rank_lock(path), _registered(os.path.realpath(path)):
        yield


@contextlib.contextmanager
def rank_lock(path: Path) -> Iterator[None]:
    """Keep other runs from a directory while this rank of its run trains.

    A rank whose machine does not show the file (yet) trains without a lock: the owner's suffices.

    Raises:
        UsageError: Another process has locked it for another run.
    """
    entry = _own_locks.get(os.path.realpath(path))
    if entry is not None and entry.process == os.getpid():
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(RunDirectory(path).lock, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            if _lock(descriptor, _RANKS_BYTE, fcntl.LOCK_SH) is False:
                raise _in_use(path, _read(descriptor))
        yield


@contextlib.contextmanager
def _registered(key: str) -> Iterator[None]:
    _own_locks[key] = _OwnLock(os.getpid())
    try:
        yield
    finally:
        del _own_locks[key]


@contextlib.contextmanager
def _lock_of(path: Path) -> Iterator[None]:
    directory = RunDirectory(path)
    made: list[Path] = []
    try:
        with writing_run_files(directory):
            descriptor = _take(path, made)
        try:
            yield
        finally:
            _release(directory.lock, descriptor)
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # The run has left something in it.
                folder.rmdir()


def _take(path: Path, made: list[Path]) -> int:
    """Lock the file for this process; return its descriptor.

    Args:
        path: The run directory.
        made: Receives the directories that were made.
    """
    lock = RunDirectory(path).lock
    attempts = 0
    while True:
        reject_non_directory(path, "checkpoint.run_dir")
        attempts += 1
        try:
            make_directory(path, made=made)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if attempts == _ATTEMPTS:
                raise
            continue  # A run that could not start has just removed the directory.
        try:
            locked = _lock(descriptor, _OWNER_BYTE, fcntl.LOCK_EX)
            if locked is False:
                raise _in_use(path, _read(descriptor))
            if not _is_at(lock, descriptor):
                os.close(descriptor)  # Its owner has removed it after it was opened here.
                continue
            if locked is None:
                sys.stderr.write(
                    f"warning: the file system of {str(path)!r} knows no locks: nothing keeps a "
                    "second process from training there\n"
                )
            before = _read(descriptor, patience=0)
            _write(descriptor, Owner.this_process())
            if not _no_rank_is_left(descriptor, SECONDS_FOR_RANKS_TO_END):
                raise UsageError(
                    f"checkpoint.run_dir={str(path)!r}: ranks of the run of {before} have not "
                    "ended yet; wait until they have, or end them"
                )
            return descriptor
        except BaseException as error:
            if isinstance(error, OSError) and _is_at(lock, descriptor):
                # Not even the owner's name could be written.
                lock.unlink()
            os.close(descriptor)
            raise


def _release(lock: Path, descriptor: int) -> None:
    """Remove the file, unless ranks still lock it, and release the lock."""
    # Not a file of others, if somebody has removed the directory and made it again.
    if _no_rank_is_left(descriptor, SECONDS_FOR_FILE_TO_BE_LEFT) and _is_at(lock, descriptor):
        lock.unlink()
    os.close(descriptor)


def _lock(descriptor: int, byte: int, kind: int) -> bool | None:
    """Lock one byte if it is free; return whether it was, None where there are no locks."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _no_rank_is_left(descriptor: int, patience: float) -> bool:
    """Whether all ranks have ended, or do so within `patience` seconds."""
    deadline = time.monotonic() + patience
    while (locked := _lock(descriptor, _RANKS_BYTE, fcntl.LOCK_EX)) is False:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    if locked:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _RANKS_BYTE)
    return True


def _write(descriptor: int, owner: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(dataclasses.asdict(owner)).encode(), 0)


def _read(descriptor: int, patience: float = 1.0) -> Owner | str:
    """Return the owner, which may be about to write its name."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(ValueError, TypeError):
            return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
        if time.monotonic() >= deadline:
            return "another process"
        time.sleep(_POLL_SECONDS)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(path: Path, owner: Owner | str) -> UsageError:
    return UsageError(
        f"checkpoint.run_dir={str(path)!r}: {owner} trains there; wait until it has ended (a run "
        "that was asked to stop saves first), or choose another directory with --run-dir"
    )
