"""The cache of tokens and indices: its folder, and how complete contents are published in it."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed

from bridge.training.durable_files import make_directory, publish_folder, temporary_folder
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.usage_error import UsageError


def default_cache_dir() -> Path:
    """Return ``bridge/data`` under XDG_CACHE_HOME, or under ~/.cache where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "bridge" / "data"


def cache_directory(given: str | None) -> Path:
    """Return the folder of the cache: the user's ``dataset.cache_dir``, or the default."""
    if given is None:
        return default_cache_dir()
    return Path(os.path.abspath(os.path.expanduser(given)))


def digest(description: Any) -> str:
    """Return a short name for a description, which is anything that JSON can hold."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def file_state(path: Path) -> tuple[str, int, int]:
    """Return a file's path, size and time of change, for the key of what is made from it."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """Yield a directory to fill, which becomes `final` if the block ends without an exception.

    If `final` exists, it is yielded as it is. Several processes may do this at the same time: each
    fills a directory of its own, and the first one to finish wins.

    Raises:
        UsageError: The cache cannot be written.
    """
    if final.is_dir():
        yield final
        return
    full_disk = reject_full_disk(f"dataset.cache_dir: {final.parent}", "dataset.cache_dir=DIR")
    with full_disk, ExitStack() as stack:
        try:
            make_directory(final.parent)
            directory = stack.enter_context(temporary_folder(final))
        except OSError as error:
            raise UsageError(
                f"dataset.cache_dir: {final.parent} cannot be written ({error}); "
                "name a directory that can with dataset.cache_dir=DIR"
            ) from error
        yield directory
        try:
            publish_folder(directory, final)
        except OSError:
            if not final.is_dir():
                raise


@contextmanager
def reject_full_disk(place: str, option: str) -> Iterator[None]:
    """Report a full or read-only disk as the user's error while files are written in this block.

    Args:
        place: The directory, as the message names it.
        option: The option that names another directory.

    Raises:
        UsageError: In place of the OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UsageError(
            f"{place} cannot be written ({error.strerror}); make room, or name another directory "
            f"with {option}"
        ) from error


@contextmanager
def published_by_first_rank(final: Path) -> Iterator[Path]:
    """Publish (see `published`) a directory that rank 0 fills while the other ranks read it."""
    with ExitStack() as stack:
        yield on_first_rank(lambda: stack.enter_context(published(final)))
        if torch.distributed.is_initialized():
            # Until here the other ranks may open files by the temporary name, which then goes away.
            torch.distributed.barrier()
