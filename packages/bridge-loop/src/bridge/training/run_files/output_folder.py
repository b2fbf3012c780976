"""The folder that a command makes, such as a checkpoint: complete and durable, or not there."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from bridge.training.durable_files import make_directory, publish_folder, temporary_folder
from bridge.training.usage_error import UsageError


@contextlib.contextmanager
def new_folder(path: Path, field: str) -> Iterator[Path]:
    """Fill a folder that gets its name when it is complete and durable.

    Yields the folder under another name. If the block fails, nothing is left; the leftovers of a
    killed process are removed with the next folder that is made next to it.

    Args:
        path: Its final name; folders above it are made.
        field: The user's name for it, for the message.

    Raises:
        UsageError: There is something already, or nothing can be written there.
    """
    if os.path.lexists(path):
        raise UsageError(f"{field}: {str(path)!r} exists and is not overwritten; give a new folder")
    with contextlib.ExitStack() as stack:
        try:
            make_directory(path.parent)
            partial = stack.enter_context(temporary_folder(path))
        except OSError as error:
            raise UsageError(
                f"{field}: {str(path)!r} cannot be written ({error.strerror}); give another folder"
            ) from error
        try:
            yield partial
            publish_folder(partial, path)
        except OSError as error:
            if not _is_of_writing(error, partial):
                raise
            raise UsageError(
                f"{field}: {str(path)!r} cannot be written ({error.strerror or error}); make room, "
                "or give another folder"
            ) from error


def _is_of_writing(error: OSError, folder: Path) -> bool:
    """Whether an error is of writing into a folder, not of reading the sources of its content."""
    if error.filename is not None:
        return Path(os.fsdecode(error.filename)).is_relative_to(folder)
    # Writing into an open file gives no name; the writers of checkpoints and of safetensors no
    # number either.
    return error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
