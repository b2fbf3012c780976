"""Writing out what the command has said, also where nobody reads any more."""

import errno
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def flush_output() -> None:
    """Write out what was said; nobody need be there any more to read it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # A pipe's reader, or the terminal.
                raise
            # Else Python would complain about the rest at its exit, and change the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
