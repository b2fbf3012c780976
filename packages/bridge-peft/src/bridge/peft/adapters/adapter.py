"""The interface between an adapter and the wrapper of its layer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import override

import torch


@dataclass(frozen=True, kw_only=True)
class Update:
    """The change of some rows of a weight W: they become W + scale * B A.

    With a magnitude m, each of those rows V then becomes m / |V| * V.
    """

    rows: torch.Tensor | None = None
    """The indices of the rows, in the order of B's rows; None for all rows in their order."""
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None


class Adapter(torch.nn.Module, ABC):
    """The module that changes the output of a linear layer."""

    @abstractmethod
    @override
    def forward(
        self, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of the adapted layer.

        Args:
            x: The input of the base layer's product.
            output: The output of the base layer.
            bias: The bias that is in the output; None if none is.
        """

    @abstractmethod
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the base layer's weight with the adapter merged into it, in float32."""

    @abstractmethod
    def updates(self) -> list[Update]:
        """Return the changes of the base layer's weight, those of the rows on this rank."""
