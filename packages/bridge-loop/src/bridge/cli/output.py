"""Output of the command: pictures of layouts, lists of keys, a flush after its reader is gone."""

import argparse
import errno
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


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


def layout_lines(config: "ConfigContainer", ranks: int) -> list[str]:
    """Return the picture of the layout, if the model draws one."""
    from bridge.training.contracts import DrawsLayout

    drawn = config.model.layout_picture(ranks) if isinstance(config.model, DrawsLayout) else None
    return [] if drawn is None else drawn.splitlines()


def print_keys(parser: argparse.ArgumentParser, recipe: Any) -> None:
    """Print the usage of a command, and every key of a recipe with its type and default."""
    from bridge.training.config import reference_text

    parser.print_help()
    print(f"\nkeys of {recipe.name}, with the recipe's values:\n")
    print(reference_text(recipe()))
