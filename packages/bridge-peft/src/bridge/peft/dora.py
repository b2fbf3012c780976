"""DoRA: a low-rank update turns a weight's rows, a vector sets their length (arXiv:2402.09353).

With V = W + s B A and m one number for each output feature, y = m / |V| * V x, where |V| is the
length of each row of V. Gradients do not pass through |V| (section 4.3). The length is
computed without V:

    |V_i|^2 = |W_i|^2 + 2 s B_i . (A W_i) + s^2 B_i (A A^T) B_i
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, override

import torch
import torch.distributed as dist

from bridge.peft.adapters.adapter import Adapter, Update
from bridge.peft.adapters.low_rank import (
    LowRankAdapter,
    gather_like,
    set_parallel_attributes,
    sum_expert_gradient,
)
from bridge.peft.layers.linear_layout import LinearLayout
from bridge.peft.low_rank_method import LowRankMethod


class DoRAAdapter(LowRankAdapter, Adapter):
    """The adapter that turns and scales the rows of a layer's weight.

    Args:
        weight: The base layer's weight on this rank, [out features, in features].
        layout: The base layer's layout.
        options: Those of `LowRankAdapter`.
    """

    def __init__(self, weight: torch.Tensor, layout: LinearLayout, **options: Any) -> None:
        super().__init__(weight, layout, **options)
        # Not a submodule: it belongs to the base layer.
        self._weight = [weight]
        self.magnitude = torch.nn.Parameter(
            self._lengths().to(self.linear_out.weight.dtype), requires_grad=True
        )
        set_parallel_attributes(
            self.magnitude, weight, layout, split_axis=0 if layout.split == "rows" else None
        )
        self.magnitude.is_gated = self.linear_out.weight.is_gated  # type: ignore[attr-defined]

    @override
    def forward(
        self, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of the adapted layer (see `Adapter`)."""
        # First, as a call of the factors may have to fetch them from other ranks.
        delta = gather_like(self.update(x), output, self.layout)
        scale = sum_expert_gradient(self.magnitude, self.layout) / self._lengths()
        scale = gather_like(scale, output, self.layout)
        product = output + delta if bias is None else output - bias + delta
        scaled: torch.Tensor = scale * product
        return scaled if bias is None else scaled + bias

    @override
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return m / |V| * V in float32."""
        scale = self.magnitude.float() / self._lengths()
        merged: torch.Tensor = scale[:, None] * (weight.float() + self.delta_weight())
        return merged

    @override
    def updates(self) -> list[Update]:
        """Return the one update of all rows."""
        return [
            Update(
                a=self.linear_in.weight,
                b=self.linear_out.weight,
                scale=self.scale,
                magnitude=self.magnitude,
            )
        ]

    @torch.no_grad()
    def _lengths(self) -> torch.Tensor:
        """Return the length of each row of V, [out features on this rank], in float32."""
        [weight] = self._weight
        a, b = self.linear_in.weight.float(), self.linear_out.weight.float()
        w = weight.float()
        squares = (w * w).sum(dim=1)
        squares += 2 * self.scale * (b * (w @ a.t())).sum(dim=1)
        squares += self.scale**2 * (b * (b @ (a @ a.t()))).sum(dim=1)
        if self.layout.split == "columns" and self.layout.num_ranks > 1:
            dist.all_reduce(squares, group=self.layout.group)
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


@dataclass(kw_only=True)
class DoRA(LowRankMethod):
    """y = m / |V| * (W + (alpha / dim) B A) x, with W frozen and m = |W| at first."""

    adapter_class: ClassVar = DoRAAdapter
    method: Literal["dora"] = "dora"
    """The method's name."""
