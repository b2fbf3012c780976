"""The linear layers of a model: what an adapter must know of the one that it stands beside.

An adapter multiplies by A, which reads what the layer reads, and then by B, which writes what it
writes. So A is split over tensor-parallel ranks where the weight's columns are, B where its rows
are, and the other factor is whole on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from bridge.peft.megatron_patches import tensor_parallel_group

type Split = Literal["rows", "columns"] | None


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer whose weight is [out features, in features]."""

    split: Split
    """What of the weight is spread over the ranks of `group`; None: every rank has all of it."""
    group: Any
    """The tensor-parallel ranks, None where there are none."""
    is_expert: bool
    """Whether it belongs to an expert, which gets tokens of its own."""
    sequence_parallel: bool
    """Whether the side that is not split holds this rank's part of the sequence."""
    communicates: bool
    """Whether the layer itself brings the ranks' parts together. The dispatcher of the tokens does
    it for experts: their input is the same on all ranks, their outputs are added up later."""
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The norm that the layer applies to its input before the product."""

    @property
    def ranks(self) -> int:
        """Ranks over which the weight is spread."""
        return 1 if self.split is None or self.group is None else int(self.group.size())


def describe(module: torch.nn.Module) -> Linear | str | None:
    """Return what an adapter must know of a layer.

    Returns:
        A text that says why not, for a linear layer that can have no adapter; None for a module
        that is no linear layer.
    """
    if isinstance(module, ColumnParallelLinear | RowParallelLinear):
        if module.weight is None:
            return "its weight is the embedding's"
        return _megatrons(module)
    if HAVE_TE and (found := _transformer_engines(module)) is not None:
        return found
    if isinstance(module, torch.nn.Linear):
        return Linear(
            split=None, group=None, is_expert=False, sequence_parallel=False, communicates=True
        )
    if _is_grouped(module):
        return "it holds several experts in one; set model.moe_grouped_gemm=false"
    return None


def _megatrons(module: Any) -> Linear:
    communicates = not module.explicit_expert_comm
    return Linear(
        split="rows" if isinstance(module, ColumnParallelLinear) else "columns",
        group=module.tp_group,
        is_expert=module.is_expert,
        sequence_parallel=module.sequence_parallel and module.tp_group.size() > 1 and communicates,
        communicates=communicates,
    )


def _transformer_engines(module: Any) -> Linear | None:
    from megatron.core.extensions import transformer_engine as engine

    if isinstance(module, engine.TELayerNormColumnParallelLinear):
        split: Split = "rows"
        normalize = _norm_of(module)
    elif isinstance(module, engine.TELinear):
        by_class: dict[type, Split] = {
            engine.TEColumnParallelLinear: "rows",
            engine.TERowParallelLinear: "columns",
        }
        split = next((split for kind, split in by_class.items() if isinstance(module, kind)), None)
        normalize = None
    else:
        return None
    group = tensor_parallel_group(module)
    # Its communication is turned off by taking the mode away, for experts and for shared experts
    # that overlap with the dispatcher.
    communicates = split is None or module.parallel_mode is not None
    # Experts' weights are reduced over other ranks than the rest of the model where EP is used;
    # without it they are known by the mode alone.
    is_expert = not communicates or not getattr(module.weight, "allreduce", True)
    return Linear(
        split=split,
        group=group,
        is_expert=is_expert,
        sequence_parallel=bool(module.config.sequence_parallel)
        and group.size() > 1
        and communicates,
        communicates=communicates,
        normalize=normalize,
    )


def _norm_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the norm of Transformer Engine's fused layer, which keeps its result to itself."""

    def normalize(x: torch.Tensor) -> torch.Tensor:
        weight = module.layer_norm_weight
        if module.zero_centered_gamma:
            weight = weight + 1
        shape = (x.shape[-1],)
        if module.normalization == "RMSNorm":
            return torch.nn.functional.rms_norm(x, shape, weight, module.eps)
        return torch.nn.functional.layer_norm(x, shape, weight, module.layer_norm_bias, module.eps)

    return normalize


def _is_grouped(module: Any) -> bool:
    if not HAVE_TE:
        return False
    from megatron.core.extensions import transformer_engine as engine

    grouped = getattr(engine, "TEGroupedLinear", None)
    return grouped is not None and isinstance(module, grouped)
