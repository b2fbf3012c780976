"""Lists of names in messages."""

from collections.abc import Sequence


def join_first(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in one line, and the number of the others: "a, b and 3 more"."""
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {others} more" if others > 0 else "")
