"""Export of weights to other formats: the names and parts of each weight, and the request."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


@dataclass(kw_only=True, frozen=True)
class ExportedWeight:
    """A weight of a model in another format: as one tensor, or with its rows in several."""

    shape: tuple[int, ...]
    """The shape of the unsharded weight, without rows that pad it."""
    parts: Mapping[str, torch.Tensor | None]
    """The tensors there by name, each as the indices of its rows, in its order; None for all."""

    def split(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of the other format by name.

        Args:
            weight: The weight, or whatever has its rows, such as the output side of an adapter:
                ``[rows, ...]``; rows that pad it at the end are skipped.
        """
        weight = weight[: self.shape[0]]
        return {name: weight if rows is None else weight[rows] for name, rows in self.parts.items()}

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight of which these tensors are the parts, as `split` returns them."""
        weight: torch.Tensor | None = None
        for name, rows in self.parts.items():
            part = tensors[name]
            if rows is None:
                return part
            if weight is None:
                weight = part.new_empty((self.shape[0], *part.shape[1:]))
            weight[rows] = part
        assert weight is not None
        return weight

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor of this name in the other format."""
        rows = self.parts[name]
        return self.shape if rows is None else (len(rows), *self.shape[1:])


@runtime_checkable
class NamesWeights(Protocol):
    """A model section that knows its weights in the format in which others share them."""

    def exported_weights(self) -> Mapping[str, ExportedWeight]:
        """Return every weight of the model by name, in the order of the layers.

        The name is that of a checkpoint's tensor with the layer's number added, which counts over
        all pipeline stages: ``decoder.layers.3.self_attention.linear_qkv.weight``. The norm
        before a linear layer has the name that Transformer Engine's fused layer gives it:
        ``linear_qkv.layer_norm_weight``.

        Raises:
            UsageError: The format cannot represent such a model; the message names the fields.
        """


@dataclass(kw_only=True, frozen=True)
class ExportRequest:
    """A request of ``bridge export`` to the package that knows the target."""

    checkpoint: Path
    """The folder of the checkpoint."""
    config: "ConfigContainer"
    """The configuration that was saved with it."""
    output: Path
    """An empty folder. It gets its final name only after the exporter has returned."""
    dtype: torch.dtype | None
    """Type of the floating point numbers; None keeps that of the checkpoint."""
    max_shard_size: int
    """Bytes that one file may hold; a larger tensor has a file for itself."""


type Exporter = Callable[[ExportRequest], str]
