"""Which layers of a model are meant: patterns, and the names that they are held against.

A name is that of the module in the whole model, the same on every pipeline stage and rank:
``decoder.layers.7.self_attention.linear_qkv``. A pattern with a ``*`` is held against the whole
name; one without means every name that ends with it, at a dot.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.utils import unwrap_model

from bridge.peft.usage_error import UsageError


def matches(name: str, pattern: str) -> bool:
    """Tell whether a module's full dotted name is what `pattern` means."""
    if "*" in pattern:
        return fnmatch.fnmatchcase(name, re.sub(r"([\[\]?])", r"[\1]", pattern))
    return name == pattern or name.endswith(f".{pattern}")


def named_modules(chunk: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Yield the modules of a model chunk: name in the whole model, name in the chunk, module.

    Layers are counted over all pipeline stages, experts over all ranks. Wrappers have no part in
    the names.
    """
    root = unwrap_model(chunk)
    renamed: dict[str, str] = {"": ""}
    for local, module in root.named_modules():
        if not local:
            continue
        parent, _, last = local.rpartition(".")
        renamed[local] = f"{renamed[parent]}.{_global_part(root, parent, last)}".lstrip(".")
        yield renamed[local], local, module


def _global_part(root: torch.nn.Module, parent: str, last: str) -> str:
    """Return what the last part of a module's name is in the whole model."""
    if not last.isdigit():
        return last
    holder, _, container = parent.rpartition(".")
    if container == "layers":
        number = getattr(root.get_submodule(f"{parent}.{last}"), "layer_number", None)
        return last if number is None else str(number - 1)
    if container == "local_experts" and isinstance(
        experts := root.get_submodule(holder), SequentialMLP
    ):
        return str(experts.ep_group.rank() * experts.num_local_experts + int(last))
    return last


def refuse_unmatched(
    field: str,
    patterns: Sequence[str],
    names: Iterable[str],
    passed_over: Mapping[str, str],
    group: Any = None,
) -> None:
    """Refuse patterns that match no name on any rank.

    A collective where there are ranks: a pattern may match on another pipeline stage alone.

    Args:
        field: Where the patterns stand, such as "peft.target_modules".
        patterns: What is to match.
        names: The names on this rank.
        passed_over: By name, modules of this rank that cannot be meant, and why not.
        group: The process group to decide with; all ranks if None.

    Raises:
        UsageError: With each such pattern and what it was probably meant to be; on every rank.
    """
    unmatched = {p for p in patterns if not any(matches(name, p) for name in names)}
    unmatched.intersection_update(*of_all_ranks(unmatched, group))
    if not unmatched:
        return
    everywhere: set[str] = set().union(*of_all_ranks(set(names), group))
    reasons: dict[str, str] = {}
    for part in of_all_ranks(dict(passed_over), group):
        reasons |= part
    lines = [_line(field, p, everywhere, reasons) for p in patterns if p in unmatched]
    raise UsageError("\n".join(lines))


def _line(field: str, pattern: str, names: set[str], passed_over: Mapping[str, str]) -> str:
    for name, reason in passed_over.items():
        if matches(name, pattern):
            return f"{field}: {pattern!r} is {name}, which cannot be adapted: {reason}"
    known = _short_names(names)
    if not known:
        return f"{field}: {pattern!r} matches nothing, as the model has no layer to adapt"
    near = difflib.get_close_matches(pattern.rpartition(".")[2], known, n=1)
    full = [] if "." not in pattern else difflib.get_close_matches(pattern, sorted(names), n=1)
    meant = full or near
    hint = f"; did you mean {meant[0]!r}?" if meant else ""
    return f"{field}: {pattern!r} matches no layer{hint} (there are {', '.join(known)})"


def _short_names(names: set[str]) -> list[str]:
    """Return the last parts of names, or more of them where those are numbers."""
    return sorted({_short_name(name) for name in names})


def _short_name(name: str) -> str:
    parts = name.split(".")
    first = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[first:])


def of_all_ranks[T](mine: T, group: Any) -> list[T]:
    """Return what each rank of a group has, the default one if None; a collective."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
