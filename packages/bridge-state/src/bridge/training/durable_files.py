"""Files and folders that survive a crash: written under a temporary name, synced, then renamed."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{12}")
_UNLOCKED_FOR_SECONDS = 2.0
_UNTOUCHED_FOR_SECONDS = 3600.0


def replace_durably(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader finds the old or the new content, even after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    sync_file(path)


def sync_tree(path: Path) -> None:
    """Make every file below a directory durable."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync_file(Path(folder) / name)
        sync_directory(Path(folder))


def make_directory(path: Path, *, made: list[Path] | None = None) -> None:
    """Make a directory and its missing parents, durably; the directory may exist already.

    Args:
        path: The directory.
        made: Receives each directory that this call has made, parents first.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in (*reversed(missing), path):
        try:
            folder.mkdir()
        except FileExistsError:
            if not folder.is_dir():
                raise
        else:
            if made is not None:
                made.append(folder)
            sync_directory(folder.parent)


@contextlib.contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder next to `final`, to be filled; remove it at the end of the block.

    The block may rename it to `final` (`publish_folder`). Folders that killed processes have left
    next to `final` are removed first (`abandoned_folders`).
    """
    for leftover in abandoned_folders(final.parent):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = final.with_name(f".{final.name}.partial-{secrets.token_hex(6)}")
    folder.mkdir()
    try:
        with _opened(folder) as descriptor:
            _lock(descriptor, waits=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, final: Path) -> None:
    """Make the files of a `temporary_folder` durable, and rename it to its final name.

    Raises:
        OSError: `final` exists already, or the files cannot be made durable.
    """
    sync_tree(folder)
    folder.rename(final)
    sync_directory(final.parent)


def abandoned_folders(parent: Path) -> list[Path]:
    """Return the folders of `temporary_folder` that killed processes have left in a directory.

    A folder is abandoned if no process holds its lock or, on a file system without locks, if it has
    not changed for an hour.
    """
    found = []
    for partial in parent.glob(".*.partial-*"):
        if not _PARTIAL.fullmatch(partial.name):
            continue
        # It may have been renamed or removed meanwhile, or be another user's.
        with contextlib.suppress(OSError):
            if _is_abandoned(partial):
                found.append(partial)
    return found


def _is_abandoned(partial: Path) -> bool:
    """Whether no process fills the folder any more."""
    age = time.time() - partial.stat().st_mtime
    with _opened(partial) as descriptor:
        is_locked = _lock(descriptor)
    if is_locked is not None:
        # A new folder is about to be locked.
        return not is_locked and age > _UNLOCKED_FOR_SECONDS
    changed = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
    return time.time() - changed > _UNTOUCHED_FOR_SECONDS


def _lock(descriptor: int, *, waits: bool = False) -> bool | None:
    """Take the lock of a folder; return whether another process has it, None without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
