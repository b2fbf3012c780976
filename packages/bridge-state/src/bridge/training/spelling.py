"""The nearest valid name to a misspelled one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate most similar to `name`, None if none is similar enough."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'that'?", or "" if no candidate is similar enough."""
    near = nearest(name, candidates)
    return f"; did you mean {near!r}?" if near else ""
