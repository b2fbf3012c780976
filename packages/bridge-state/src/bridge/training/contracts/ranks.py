"""Modules on ranks of their own: what the loop asks about such a rank."""

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from bridge.training.contracts.data import DataShare

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@runtime_checkable
class ModuleRanks(Protocol):
    """What the loop asks about a rank of a run whose modules are on ranks of their own.

    It stands wherever the loop takes process groups, as megatron-core's
    MultiModuleProcessGroupCollection, which it extends. Each rank holds one module.
    """

    own: "ProcessGroupCollection"
    """The groups of the module on this rank."""
    replicas: int
    """Copies of the whole model: what train.global_batch_size is divided over."""
    stage: int
    """This rank's place in the pipeline that the modules form, from 0 on."""
    is_last_stage: bool
    """Whether losses are known here."""
    reads_inputs_of: frozenset[str]
    """The module on this rank, if it begins here."""

    def share(self, micro_batch_size: int) -> DataShare:
        """Return what this rank reads of the samples."""
        ...

    @property
    def smallest_microbatch(self) -> int:
        """Samples of which a microbatch holds a multiple, so that every module gets whole ones."""
        ...

    def communicator(self, model_config: Any) -> Any:
        """Return what sends tensors between the stages, the same object at every call."""
        ...

    def total(self, number: "torch.Tensor") -> None:
        """Make a number that the last stages have the sum over all of them, on every rank."""
        ...

    def gradient_factor(self, *, summed: bool) -> float:
        """Return what this rank's gradients are to be multiplied by, once they are reduced.

        Args:
            summed: Whether they are the sum over data-parallel ranks; else the mean.
        """
        ...

    def optimizer(self, own: Any, optimizer_config: Any) -> Any:
        """Return the optimizer of all modules' weights.

        Args:
            own: The optimizer of this rank's weights; None where none is trained.
            optimizer_config: megatron-core's.
        """
        ...


@runtime_checkable
class PlacesModules(Protocol):
    """A model section whose modules may be on ranks of their own."""

    def module_ranks(
        self, *, world_size: int, timeout: timedelta
    ) -> "AbstractContextManager[ModuleRanks] | None":
        """Return what brings up the process groups, and takes them down; a collective.

        None where all modules are on all ranks, in megatron-core's own groups.

        Args:
            world_size: Ranks of the run.
            timeout: How long a collective may take.
        """
        ...


@runtime_checkable
class HoldsOneModule(Protocol):
    """A model of which this rank holds one module, which is trained for itself."""

    def own_module(self) -> "tuple[torch.nn.Module, Any]":
        """Return the module, and its megatron-core TransformerConfig."""
        ...

    def replace_own_module(self, wrapped: "torch.nn.Module") -> None:
        """Put the module, wrapped for training, in its place."""
        ...


def own_groups(groups: "ProcessGroupCollection | ModuleRanks") -> "ProcessGroupCollection":
    """Return the process groups of what a rank holds of the model."""
    return groups.own if isinstance(groups, ModuleRanks) else groups


def replicas_of(groups: "ProcessGroupCollection | ModuleRanks") -> int:
    """Return the number of copies of the model that a global batch is divided over."""
    return groups.replicas if isinstance(groups, ModuleRanks) else int(groups.dp.size())
