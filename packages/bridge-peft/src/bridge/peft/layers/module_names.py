"""The names of modules in the unsharded model, the same on every pipeline stage and rank.

An example is ``decoder.layers.7.self_attention.linear_qkv``.
"""

from collections.abc import Iterator

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.utils import unwrap_model


def named_modules(chunk: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Yield the modules of a model chunk: name in the unsharded model, name in the chunk, module.

    Layers are counted over all pipeline stages, experts over all ranks. Names leave wrappers out.
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
    """Return the last part of a module's name in the unsharded model."""
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
