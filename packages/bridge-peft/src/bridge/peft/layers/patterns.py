"""The patterns that select layers by their names.

A pattern with a ``*`` is matched against the whole name. One without matches every name that ends
with it, at a dot.
"""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from bridge.peft.usage_error import UsageError


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a module's full dotted name."""
    if "*" in pattern:
        return fnmatch.fnmatchcase(name, re.sub(r"([\[\]?])", r"[\1]", pattern))
    return name == pattern or name.endswith(f".{pattern}")


def reject_unmatched(
    field: str,
    patterns: Sequence[str],
    names: set[str],
    unadaptable: Mapping[str, str],
    group: Any,
) -> None:
    """Reject patterns that match no name on any rank.

    A collective where there are ranks: a pattern may match on another pipeline stage alone.

    Args:
        field: The field of the patterns, such as "peft.target_modules".
        patterns: The patterns.
        names: The names on this rank.
        unadaptable: By name, the modules of this rank that cannot be adapted, and why not.
        group: The process group to decide with; all ranks if None.

    Raises:
        UsageError: A pattern matches nothing. On every rank, with a line for each such pattern and
            the nearest name.
    """
    unmatched = {p for p in patterns if not any(matches(name, p) for name in names)}
    unmatched.intersection_update(*gather_from_ranks(unmatched, group))
    if not unmatched:
        return
    all_names: set[str] = set().union(*gather_from_ranks(names, group))
    reasons: dict[str, str] = {}
    for part in gather_from_ranks(dict(unadaptable), group):
        reasons |= part
    lines = [_line(field, p, all_names, reasons) for p in patterns if p in unmatched]
    raise UsageError("\n".join(lines))


def _line(field: str, pattern: str, names: set[str], unadaptable: Mapping[str, str]) -> str:
    for name, reason in unadaptable.items():
        if matches(name, pattern):
            return f"{field}: {pattern!r} is {name}, which cannot be adapted: {reason}"
    known = sorted({_short_name(name) for name in names})
    if not known:
        return f"{field}: {pattern!r} matches nothing, as the model has no layer to adapt"
    near = difflib.get_close_matches(pattern.rpartition(".")[2], known, n=1)
    full = [] if "." not in pattern else difflib.get_close_matches(pattern, sorted(names), n=1)
    meant = full or near
    hint = f"; did you mean {meant[0]!r}?" if meant else ""
    return f"{field}: {pattern!r} matches no layer{hint} (there are {', '.join(known)})"


def _short_name(name: str) -> str:
    """Return the last part of a name, with the parts before it as long as it is a number."""
    parts = name.split(".")
    first = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[first:])


def gather_from_ranks[T](value: T, group: Any) -> list[T]:
    """Return the value of each rank of a group, the default one if None; a collective."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
