"""LoRA: each adapted layer learns an update of low rank (arXiv:2106.09685)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, override

import torch

from bridge.peft.adapters.adapter import Adapter, Update
from bridge.peft.adapters.low_rank import LowRankAdapter, gather_like
from bridge.peft.low_rank_method import LowRankMethod


class LoRAAdapter(LowRankAdapter, Adapter):
    """The adapter that adds s B A x to a layer's output."""

    @override
    def forward(
        self, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of the adapted layer (see `Adapter`)."""
        weight = self.linear_out.weight
        if output.dtype == weight.dtype and output.shape[-1] == weight.shape[0]:
            added: torch.Tensor = self.linear_out(self.hidden(x), onto=output)
            return added
        return output + gather_like(self.update(x), output, self.layout)

    @override
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + s B A in float32."""
        return weight.float() + self.delta_weight()

    @override
    def updates(self) -> list[Update]:
        """Return the one update of all rows."""
        return [Update(a=self.linear_in.weight, b=self.linear_out.weight, scale=self.scale)]


@dataclass(kw_only=True)
class LoRA(LowRankMethod):
    """y = W x + (alpha / dim) B A x, with W frozen."""

    adapter_class: ClassVar = LoRAAdapter
    method: Literal["lora"] = "lora"
    """The method's name."""
