"""The contract of methods of parameter-efficient fine-tuning, and of the layers they adapt."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch


class LowRankUpdate(Protocol):
    """The update that a method of parameter-efficient fine-tuning adds to some rows of a weight W.

    The rows become W + scale * B A; with `magnitude`, each of them is then scaled to have that
    norm.
    """

    @property
    def rows(self) -> torch.Tensor | None:
        """The indices of the rows, in the order of B's; None for all rows in theirs."""

    @property
    def a(self) -> torch.Tensor:
        """[rank, columns of W]."""

    @property
    def b(self) -> torch.Tensor:
        """[rows, rank]."""

    @property
    def scale(self) -> float:
        """The factor of B A."""

    @property
    def magnitude(self) -> torch.Tensor | None:
        """[rows]."""


class AdaptedLayer(Protocol):
    """A layer to which a method of parameter-efficient fine-tuning has added parameters."""

    @property
    def name(self) -> str:
        """The name within the unsharded model, the same under every parallel layout."""

    def low_rank_updates(self) -> Sequence[LowRankUpdate]:
        """Return this rank's shards of the updates of the layer's weight."""


@runtime_checkable
class PEFTMethod(Protocol):
    """A method that trains few parameters on top of a frozen model: the section ``peft`` of a run.

    The loop loads the model's weights, lets the method attach, wraps the result in DDP, and loads
    the state of what was attached. It trains and saves what requires gradients then. A new
    parameter may name in ``initializer`` a function that fills a tensor of its full shape: with
    rng.layout_invariant_init it is drawn so, as the model's own weights are. The modules that were
    attached name their shards of the model by ``sharded_state_dict``, as megatron-core's do.

    A method is a dataclass. Installed packages offer theirs by entry points of the group
    ``bridge.peft``, under the name `method`.
    """

    @property
    def method(self) -> str:
        """The method's name, a field of the dataclass."""

    def attach(
        self, model_chunks: Sequence[torch.nn.Module], group: Any = None
    ) -> "Sequence[AdaptedLayer]":
        """Freeze the model and add the parameters that train to its layers.

        Args:
            model_chunks: This rank's part of the model with its weights, wrapped for 16 bits or
                not.
            group: The process group of all ranks, for decisions that are equal on them.

        Raises:
            UsageError: The fields do not fit the model.
        """

    def merge(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """Fold what was trained into the model's own weights, and leave a plain model."""
