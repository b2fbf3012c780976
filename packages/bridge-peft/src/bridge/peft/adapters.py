"""The low-rank update of one linear layer: y = W x + s B A x, with s = alpha / rank.

A is [rank, in features] and random, B is [out features, rank] and zero at first (LoRA,
arXiv:2106.09685, section 4.1). Under tensor parallelism only the rank-wide product in the middle
travels: the layer's wide inputs and outputs are not moved a second time.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

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

from bridge.peft.linears import Linear


class Factor(torch.nn.Module):
    """One of the two matrices.

    Args:
        weight: The base layer's weight, from which the factor takes device and ranks.
        shape: The factor's shape on this rank.
        linear: The base layer.
        is_split: Whether other tensor-parallel ranks hold other parts of it.
        split_axis: Which of its axes that is.
        dtype: Of its numbers.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        shape: tuple[int, int],
        linear: Linear,
        *,
        is_split: bool,
        split_axis: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))
        self._linear = linear
        mark(self.weight, weight, linear, split_axis=split_axis if is_split else None)

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """Return the product with x.

        Args:
            x: [..., in features of the factor].
            onto: Is added, in one pass over it, [..., out features of the factor]; None for
                nothing.
        """
        weight = whole_gradient(self.weight, self._linear)
        if onto is None:
            return functional.linear(x, weight)
        added = torch.addmm(onto.flatten(end_dim=-2), x.flatten(end_dim=-2), weight.t())
        return added.view_as(onto)


def mark(
    parameter: torch.Tensor, weight: torch.Tensor, linear: Linear, *, split_axis: int | None
) -> None:
    """Tell megatron-core which ranks a new parameter is spread over, and who adds its gradients.

    Args:
        parameter: The adapter's.
        weight: The base layer's, whose data-parallel ranks are those of the adapter.
        linear: The base layer.
        split_axis: The axis along which other tensor-parallel ranks hold other parts; None if
            every rank has all of it.
    """
    marks = {
        "allreduce": getattr(weight, "allreduce", True),
        "tensor_model_parallel": split_axis is not None and linear.ranks > 1,
        "partition_dim": -1 if split_axis is None else split_axis,
        "partition_stride": 1,
        # Each rank saw its part of the sequence alone.
        "sequence_parallel": split_axis is None and linear.sequence_parallel,
    }
    for name, value in marks.items():
        setattr(parameter, name, value)


def whole_gradient(parameter: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Return an expert's parameter such that its gradient is added up over tensor-parallel ranks.

    Nothing else does so where the layer leaves the communication to the dispatcher.
    """
    is_split = parameter.partition_dim >= 0  # type: ignore[attr-defined]
    if linear.communicates or linear.ranks == 1 or is_split:
        return parameter
    whole: torch.Tensor = copy_to_tensor_model_parallel_region(parameter, group=linear.group)
    return whole


class LowRankAdapter(torch.nn.Module):
    """A and B beside one layer, or beside some rows of it.

    Args:
        weight: The base layer's weight on this rank, [out features, in features].
        linear: The base layer.
        dim: The rank.
        alpha: The numerator of the scale.
        dropout: Probability of leaving an input feature out before A.
        dtype: Of A, B and the products with them; None for the weight's.
        rows: Rows of the weight on this rank that the adapter updates; None for all of them.
        is_gated: Whether the rows are a gate and, below it, the values it is multiplied with.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        linear: Linear,
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
        factor = partial(Factor, weight, linear=linear, dtype=dtype or weight.dtype)
        self.linear_in = factor(
            (dim, in_features), is_split=linear.split == "columns", split_axis=1
        )
        self.linear_out = factor(
            (out_features if rows is None else rows, dim),
            is_split=linear.split == "rows",
            split_axis=0,
        )
        self.scale = alpha / dim
        self.dropout = dropout
        # Checkpoints keep the two halves of such rows apart.
        self.linear_out.weight.is_gated = is_gated  # type: ignore[attr-defined]
        self.linear = linear
        whole = in_features * (linear.ranks if linear.split == "columns" else 1)
        self._draw(bound=1 / math.sqrt(whole))

    def _draw(self, bound: float) -> None:
        """Start A as torch starts a linear layer's weight, uniform within 1/sqrt(in features).

        The parameter names its initialiser too, for a loop that draws weights by their names.
        """
        weight = self.linear_in.weight
        weight.initializer = partial(torch.nn.init.uniform_, a=-bound, b=bound)  # type: ignore[attr-defined]
        is_split = self.linear.split == "columns"
        with torch.no_grad(), self._stream(other_on_each_rank=is_split):
            torch.nn.init.uniform_(weight, -bound, bound)
        if self.linear.ranks > 1 and not is_split:
            # Experts draw from streams of their own, other ones on each rank.
            dist.broadcast(weight.data, group=self.linear.group, group_src=0)

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
        """Return s A x, [..., rank]: scaled here, where it is narrow."""
        hidden = self.linear_in(self._dropped(x).to(self.linear_in.weight.dtype))
        return self.scale * self._across_ranks(hidden)

    def _across_ranks(self, hidden: torch.Tensor) -> torch.Tensor:
        linear = self.linear
        if linear.ranks == 1 or not linear.communicates:
            return hidden
        if linear.split == "rows":
            move = (
                gather_from_sequence_parallel_region
                if linear.sequence_parallel
                else copy_to_tensor_model_parallel_region
            )
        else:
            move = (
                reduce_scatter_to_sequence_parallel_region
                if linear.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
        moved: torch.Tensor = move(hidden, group=linear.group)
        return moved

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.dropout == 0:
            return x
        linear = self.linear
        with self._stream(linear.split == "columns" or linear.sequence_parallel):
            return functional.dropout(x, self.dropout)

    @contextlib.contextmanager
    def _stream(self, other_on_each_rank: bool) -> Iterator[None]:
        """Draw random numbers from the stream that fits the tensor-parallel ranks.

        What every rank has must be drawn alike, parts of something must not. Experts have other
        numbers of tokens on each rank, so they leave the common stream alone.
        """
        tracker: Any = get_cuda_rng_tracker()
        if self.linear.group is None or not tracker.is_initialized():
            yield
        elif self.linear.is_expert:
            with tracker.fork(get_expert_parallel_rng_tracker_name()):
                yield
        elif other_on_each_rank and self.linear.ranks > 1:
            with tracker.fork():
                yield
        else:
            yield


def gathered_like(delta: torch.Tensor, output: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Bring the rows of all ranks together where the base layer has done so with its own."""
    if delta.shape[-1] == output.shape[-1]:
        return delta
    gathered: torch.Tensor = gather_from_tensor_model_parallel_region(delta, group=linear.group)
    return gathered
