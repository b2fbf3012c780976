"""What a name that does not exist was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate that `name` was most probably meant to be, if one is near enough."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'that'?", nothing if no candidate is near enough."""
    near = nearest(name, candidates)
    return f"; did you mean {near!r}?" if near else ""
