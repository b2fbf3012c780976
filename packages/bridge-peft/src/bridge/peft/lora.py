"""LoRA: each adapted layer learns an update of low rank (arXiv:2106.09685)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bridge.peft.adapted import Update
from bridge.peft.adapters import LowRankAdapter, gathered_like
from bridge.peft.method import Layer, LowRankMethod


@dataclass(kw_only=True)
class LoRA(LowRankMethod):
    """y = W x + (alpha / dim) B A x, with W frozen."""

    method: Literal["lora"] = "lora"
    """The method's name."""

    def adapter_for(self, layer: Layer, meant: Sequence[str]) -> torch.nn.Module:
        """Make the adapter of a layer."""
        return LoRAAdapter(
            layer.weight, layer.linear, is_gated=layer.is_gated, **self.adapter_options()
        )


class LoRAAdapter(LowRankAdapter):
    """Adds s B A x to what a layer gives."""

    def forward(
        self, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of the adapted layer (see `bridge.peft.adapted.Adapter`)."""
        weight = self.linear_out.weight
        if output.dtype == weight.dtype and output.shape[-1] == weight.shape[0]:
            added: torch.Tensor = self.linear_out(self.hidden(x), onto=output)
            return added
        return output + gathered_like(self.update(x), output, self.linear)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + s B A in float32."""
        return weight.float() + self.delta_weight()

    def updates(self) -> list[Update]:
        """Return the one update of all rows."""
        return [Update(a=self.linear_in.weight, b=self.linear_out.weight, scale=self.scale)]
