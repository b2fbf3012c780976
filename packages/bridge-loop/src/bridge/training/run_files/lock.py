"""One run at a time in a run directory: the claim on it, and who holds it.

The claim is a POSIX record lock (``fcntl.lockf``) on the file run.lock of the directory. The
kernel releases it when the process ends, however it ends, so nothing that was killed leaves a claim
behind. NFS (version 4, or 3 with its lock daemon), Lustre mounted with ``flock`` and GPFS carry
such locks to other machines; when a machine is lost, the server frees its locks after the lease
time. ``flock`` is local to one machine on some of these, and a lease with a heartbeat would have to
guess when a silent process is dead.

Two bytes of the file are locked, whatever is in them:

- byte 0, exclusively, by the one process that claims the directory: the launcher of local ranks,
  else rank 0;
- byte 1, shared, by every other rank. A rank may outlive the process that made the claim for some
  seconds, and until then it may still write: a claim waits for it, then fails.

The text in the file says which process on which host holds the claim, for messages alone. It is
removed with the claim. POSIX locks belong to the process: a forked one has none of them, and they
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
    refuse_what_is_no_directory,
    refusing_what_cannot_be_written,
)
from bridge.training.usage_error import UsageError

SECONDS_FOR_RANKS_TO_END = 3.0
"""For the ranks of a launcher that was killed: they look after it every second."""

SECONDS_FOR_FILE_TO_BE_LEFT = 1.0
"""For the other ranks to leave the file when the run has ended on the one with the claim."""

_CLAIM, _MEMBER = 0, 1
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_POLL_SECONDS = 0.05
_ATTEMPTS = 100


@dataclass(frozen=True)
class Holder:
    """The process that holds a claim."""

    process: int
    host: str
    since: str
    """When it claimed the directory, local time."""

    @classmethod
    def this_process(cls) -> Self:
        """Return this process, from now on."""
        moment = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        return cls(os.getpid(), socket.gethostname(), moment)

    @override
    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} (since {self.since})"


@dataclass
class _Claim:
    """A directory that this process may use."""

    process: int
    """Whose entry it is: a forked process has the table of its parent and not its locks."""
    in_use: bool = False


_claims: dict[str, _Claim] = {}
_table = threading.Lock()


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Claim a run directory, making it if it is not there; release it at the end.

    Within `claimed` or `claimed_by_launcher` of the same process it takes over their claim. A
    directory that was made for the claim and is empty at the end is removed.

    Raises:
        UsageError: Another process or thread trains there, or the directory cannot be written.
    """
    key = os.path.realpath(path)
    with _table:
        outer = _claims.get(key)
        if outer is not None and outer.process == os.getpid():
            if outer.in_use:
                raise _in_use(path, Holder.this_process())
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
def claimed_by_launcher(path: Path) -> Iterator[None]:
    """Let this rank use the directory that its launcher has claimed.

    Raises:
        UsageError: Another process has claimed it since the launcher has ended.
    """
    with joined(path), _registered(os.path.realpath(path)):
        yield


@contextlib.contextmanager
def joined(path: Path) -> Iterator[None]:
    """Keep others from a directory while this rank of its run goes on.

    A rank whose machine does not show the file, or not yet, goes on without: the claim is what
    counts.

    Raises:
        UsageError: Another process has claimed it for another run.
    """
    entry = _claims.get(os.path.realpath(path))
    if entry is not None and entry.process == os.getpid():
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(RunDirectory(path).lock, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            if _lock(descriptor, _MEMBER, fcntl.LOCK_SH) is False:
                raise _in_use(path, _read(descriptor))
        yield


@contextlib.contextmanager
def _registered(key: str) -> Iterator[None]:
    _claims[key] = _Claim(os.getpid())
    try:
        yield
    finally:
        del _claims[key]


@contextlib.contextmanager
def _lock_of(path: Path) -> Iterator[None]:
    directory = RunDirectory(path)
    made: list[Path] = []
    try:
        with refusing_what_cannot_be_written(directory):
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
        refuse_what_is_no_directory(path, "checkpoint.run_dir")
        attempts += 1
        try:
            make_directory(path, made=made)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if attempts == _ATTEMPTS:
                raise
            continue  # A run that could not start has just removed the directory.
        try:
            locked = _lock(descriptor, _CLAIM, fcntl.LOCK_EX)
            if locked is False:
                raise _in_use(path, _read(descriptor))
            if not _is_at(lock, descriptor):
                os.close(descriptor)  # Its holder has removed it after it was opened here.
                continue
            if locked is None:
                sys.stderr.write(
                    f"warning: the file system of {str(path)!r} knows no locks: nothing keeps a "
                    "second process from training there\n"
                )
            before = _read(descriptor, patience=0)
            _write(descriptor, Holder.this_process())
            if not _no_rank_is_left(descriptor, SECONDS_FOR_RANKS_TO_END):
                raise UsageError(
                    f"checkpoint.run_dir={str(path)!r}: ranks of the run of {before} have not "
                    "ended yet; wait until they have, or end them"
                )
            return descriptor
        except BaseException as error:
            if isinstance(error, OSError) and _is_at(lock, descriptor):
                # Not even the holder's name could be written.
                lock.unlink()
            os.close(descriptor)
            raise


def _release(lock: Path, descriptor: int) -> None:
    """Remove the file, unless ranks still hold on to it, and release the claim."""
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
    while (locked := _lock(descriptor, _MEMBER, fcntl.LOCK_EX)) is False:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    if locked:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _MEMBER)
    return True


def _write(descriptor: int, holder: Holder) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(dataclasses.asdict(holder)).encode(), 0)


def _read(descriptor: int, patience: float = 1.0) -> Holder | str:
    """Return who holds the claim; it may be about to write that down."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(ValueError, TypeError):
            return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
        if time.monotonic() >= deadline:
            return "another process"
        time.sleep(_POLL_SECONDS)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(path: Path, holder: Holder | str) -> UsageError:
    return UsageError(
        f"checkpoint.run_dir={str(path)!r}: {holder} trains there; wait until it has ended (a run "
        "that was asked to stop saves first), or choose another directory with --run-dir"
    )
