"""The layout of a linear layer over ranks: the facts about it that an adapter needs.

An adapter multiplies by A, which reads the layer's input, and then by B, which writes its output.
So A is sharded over tensor-parallel ranks where the weight's columns are, B where its rows are, and
the other factor is replicated on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.extensions import transformer_engine as engine
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from bridge.peft.private_names import tensor_parallel_group

type Split = Literal["rows", "columns"] | None


@dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """The layout of a linear layer whose weight is [out features, in features]."""

    split: Split
    """The axis of the weight that is sharded over the ranks of `group`; None if every rank has all
    of it."""
    group: Any
    """The tensor-parallel ranks, None where there are none."""
    is_expert: bool
    """Whether the layer belongs to an expert, which gets only the tokens that are routed to it."""
    is_sequence_parallel: bool
    """Whether the side that is not split holds this rank's part of the sequence."""
    is_communicating: bool
    """Whether the layer itself communicates between the ranks. For experts the token dispatcher
    does: their input is the same on all ranks, their outputs are summed later."""
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The norm that the layer applies to its input before the product."""

    @property
    def num_ranks(self) -> int:
        """Ranks over which the weight is sharded."""
        return 1 if self.split is None or self.group is None else int(self.group.size())


def find_layout(module: torch.nn.Module) -> LinearLayout | str | None:
    """Return the layout of a linear layer.

    Returns:
        The reason, for a linear layer that cannot have an adapter; None for a module of another
        kind.
    """
    if isinstance(module, ColumnParallelLinear | RowParallelLinear):
        if module.weight is None:
            return "its weight is the embedding's"
        return _megatron_layout(module)
    if engine.HAVE_TE and (layout := _transformer_engine_layout(module)) is not None:
        return layout
    if isinstance(module, torch.nn.Linear):
        return LinearLayout(
            split=None,
            group=None,
            is_expert=False,
            is_sequence_parallel=False,
            is_communicating=True,
        )
    if engine.TEGroupedLinear is not None and isinstance(module, engine.TEGroupedLinear):
        return "it holds several experts in one; set model.moe_grouped_gemm=false"
    return None


def _megatron_layout(module: Any) -> LinearLayout:
    is_communicating = not module.explicit_expert_comm
    return LinearLayout(
        split="rows" if isinstance(module, ColumnParallelLinear) else "columns",
        group=module.tp_group,
        is_expert=module.is_expert,
        is_sequence_parallel=module.sequence_parallel
        and module.tp_group.size() > 1
        and is_communicating,
        is_communicating=is_communicating,
    )


def _transformer_engine_layout(module: Any) -> LinearLayout | None:
    has_norm = isinstance(module, engine.TELayerNormColumnParallelLinear)
    if has_norm or isinstance(module, engine.TEColumnParallelLinear):
        split: Split = "rows"
    elif isinstance(module, engine.TERowParallelLinear):
        split = "columns"
    elif isinstance(module, engine.TELinear):
        split = None
    else:
        return None
    group = tensor_parallel_group(module)
    # megatron-core turns the communication off by removing the mode, for experts and for shared
    # experts that overlap with the dispatcher.
    is_communicating = split is None or module.parallel_mode is not None
    # Under expert parallelism the weights of experts are reduced over other ranks than the rest of
    # the model. Without it only the mode distinguishes experts from other layers.
    is_expert = not is_communicating or not getattr(module.weight, "allreduce", True)
    return LinearLayout(
        split=split,
        group=group,
        is_expert=is_expert,
        is_sequence_parallel=bool(module.config.sequence_parallel)
        and group.size() > 1
        and is_communicating,
        is_communicating=is_communicating,
        normalize=_norm_of(module) if has_norm else None,
    )


def _norm_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the norm of Transformer Engine's fused layer, which does not return its result."""

    def normalize(x: torch.Tensor) -> torch.Tensor:
        weight = module.layer_norm_weight
        if module.zero_centered_gamma:
            weight = weight + 1
        shape = (x.shape[-1],)
        if module.normalization == "RMSNorm":
            return torch.nn.functional.rms_norm(x, shape, weight, module.eps)
        return torch.nn.functional.layer_norm(x, shape, weight, module.layer_norm_bias, module.eps)

    return normalize
