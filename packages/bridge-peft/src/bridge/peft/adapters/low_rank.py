"""The low-rank update of one linear layer: y = W x + s B A x, with s = alpha / rank.

A is [rank, in features] and random, B is [out features, rank] and zero at first (LoRA,
arXiv:2106.09685, section 4.1). Under tensor parallelism only the product A x, of width rank, is
communicated: the layer's wide inputs and outputs are not sent a second time.
"""

import contextlib
import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, override

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from torch.nn import functional

from bridge.peft.layers.linear_layout import LinearLayout, Split

_COMMUNICATION: dict[tuple[Split, bool], Any] = {
    ("rows", False): copy_to_tensor_model_parallel_region,
    ("rows", True): gather_from_sequence_parallel_region,
    ("columns", False): reduce_from_tensor_model_parallel_region,
    ("columns", True): reduce_scatter_to_sequence_parallel_region,
}
"""The communication of A x before B, by the layer's split and whether it is sequence-parallel."""


class Factor(torch.nn.Module):
    """One of the two matrices of a low-rank update.

    Args:
        weight: The base layer's weight, whose device and ranks are those of the factor.
        shape: The factor's shape on this rank.
        layout: The base layer's layout.
        split_axis: The axis along which the factor is sharded over tensor-parallel ranks; None if
            every rank has all of it.
        dtype: The factor's dtype.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        shape: tuple[int, int],
        layout: LinearLayout,
        *,
        split_axis: int | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))
        self._layout = layout
        set_parallel_attributes(self.weight, weight, layout, split_axis=split_axis)

    @override
    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """Return the product with x.

        Args:
            x: [..., in features of the factor].
            onto: A tensor that is added in the same pass over memory, [..., out features of the
                factor]; None adds nothing.
        """
        weight = sum_expert_gradient(self.weight, self._layout)
        if onto is None:
            return functional.linear(x, weight)
        added = torch.addmm(onto.flatten(end_dim=-2), x.flatten(end_dim=-2), weight.t())
        return added.view_as(onto)


def set_parallel_attributes(
    parameter: torch.Tensor, weight: torch.Tensor, layout: LinearLayout, *, split_axis: int | None
) -> None:
    """Set the attributes by which megatron-core shards a new parameter and reduces its gradient.

    Args:
        parameter: The adapter's parameter.
        weight: The base layer's weight, whose data-parallel ranks are those of the adapter.
        layout: The base layer's layout.
        split_axis: The axis along which the parameter is sharded over tensor-parallel ranks; None
            if every rank has all of it.
    """
    attributes = {
        "allreduce": getattr(weight, "allreduce", True),
        "tensor_model_parallel": split_axis is not None and layout.num_ranks > 1,
        "partition_dim": -1 if split_axis is None else split_axis,
        "partition_stride": 1,
        # The gradient on each rank is that of its part of the sequence alone.
        "sequence_parallel": split_axis is None and layout.is_sequence_parallel,
    }
    for name, value in attributes.items():
        setattr(parameter, name, value)


def sum_expert_gradient(parameter: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """Return an expert's parameter such that its gradient is summed over tensor-parallel ranks.

    Nothing else sums it where the layer leaves the communication to the dispatcher.
    """
    is_split = parameter.partition_dim >= 0  # type: ignore[attr-defined]
    if layout.is_communicating or layout.num_ranks == 1 or is_split:
        return parameter
    summed: torch.Tensor = copy_to_tensor_model_parallel_region(parameter, group=layout.group)
    return summed


class LowRankAdapter(torch.nn.Module):
    """A and B on top of one layer, or on top of some rows of it.

    Args:
        weight: The base layer's weight on this rank, [out features, in features].
        layout: The base layer's layout.
        dim: The rank.
        alpha: The numerator of the scale.
        dropout: Probability of zeroing an input feature before A.
        dtype: Dtype of A, B and the products with them; None for the weight's.
        rows: Number of rows of the weight on this rank that the adapter updates; None for all.
        is_gated: Whether the rows are a gate followed by the values that it multiplies.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        layout: LinearLayout,
        *,
        dim: int,
        alpha: float,
        dropout: float,
        dtype: torch.dtype | None = None,
        rows: int | None = None,
        is_gated: bool = False,
    ) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        factor = partial(Factor, weight, layout=layout, dtype=dtype or weight.dtype)
        self.linear_in = factor(
            (dim, in_features), split_axis=1 if layout.split == "columns" else None
        )
        self.linear_out = factor(
            (out_features if rows is None else rows, dim),
            split_axis=0 if layout.split == "rows" else None,
        )
        self.scale = alpha / dim
        self.dropout = dropout
        # Checkpoints keep the two halves of such rows apart.
        self.linear_out.weight.is_gated = is_gated  # type: ignore[attr-defined]
        self.layout = layout
        unsharded = in_features * (layout.num_ranks if layout.split == "columns" else 1)
        self._initialize(bound=1 / math.sqrt(unsharded))

    def _initialize(self, bound: float) -> None:
        """Initialize A as torch does a linear layer's weight: uniform within 1/sqrt(in features).

        The parameter names its initializer too, for a loop that draws weights by their names.
        """
        weight = self.linear_in.weight
        weight.initializer = partial(torch.nn.init.uniform_, a=-bound, b=bound)  # type: ignore[attr-defined]
        is_split = self.layout.split == "columns"
        with torch.no_grad(), self._random_stream(differs_by_rank=is_split):
            torch.nn.init.uniform_(weight, -bound, bound)
        if self.layout.num_ranks > 1 and not is_split:
            # The random streams of experts differ by rank.
            dist.broadcast(weight.data, group=self.layout.group, group_src=0)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return s B A x.

        Args:
            x: The input of the base layer's product, [..., in features on this rank].
        """
        delta: torch.Tensor = self.linear_out(self.hidden(x))
        return delta

    def delta_weight(self) -> torch.Tensor:
        """Return s B A in float32, the rows and columns that are on this rank."""
        product: torch.Tensor = self.linear_out.weight.float() @ self.linear_in.weight.float()
        return self.scale * product

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Return s A x, [..., rank]. It is scaled here, where it is narrow."""
        hidden = self.linear_in(self._drop_features(x).to(self.linear_in.weight.dtype))
        return self.scale * self._communicate(hidden)

    def _communicate(self, hidden: torch.Tensor) -> torch.Tensor:
        layout = self.layout
        if layout.num_ranks == 1 or not layout.is_communicating:
            return hidden
        communicate = _COMMUNICATION[layout.split, layout.is_sequence_parallel]
        communicated: torch.Tensor = communicate(hidden, group=layout.group)
        return communicated

    def _drop_features(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.dropout == 0:
            return x
        layout = self.layout
        is_shard = layout.split == "columns" or layout.is_sequence_parallel
        with self._random_stream(differs_by_rank=is_shard):
            return functional.dropout(x, self.dropout)

    def _random_stream(self, *, differs_by_rank: bool) -> AbstractContextManager[None]:
        """Return a context that draws random numbers as the tensor-parallel ranks need them.

        A replicated tensor must be drawn alike on all ranks, shards must not. Experts have
        different numbers of tokens on each rank, so they leave the common stream alone.
        """
        layout, tracker = self.layout, get_cuda_rng_tracker()
        stream: AbstractContextManager[None] = contextlib.nullcontext()
        if layout.group is not None and tracker.is_initialized():
            if layout.is_expert:
                stream = tracker.fork(get_expert_parallel_rng_tracker_name())
            elif differs_by_rank and layout.num_ranks > 1:
                stream = tracker.fork()
        return stream


def gather_like(delta: torch.Tensor, output: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """Gather the features of all ranks where the base layer has gathered its output."""
    if delta.shape[-1] == output.shape[-1]:
        return delta
    gathered: torch.Tensor = gather_from_tensor_model_parallel_region(delta, group=layout.group)
    return gathered
