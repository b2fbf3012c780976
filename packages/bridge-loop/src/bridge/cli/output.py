"""The command's output, flushed even if its reader is gone."""

import errno
import os
import sys


def flush_output() -> None:
    """Flush the output; ignore that its reader is gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # A pipe's reader, or the terminal.
                raise
            # Else Python would fail to flush the rest at its exit, and change the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
