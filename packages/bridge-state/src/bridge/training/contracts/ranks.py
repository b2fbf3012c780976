"""The division of a model over the ranks of a run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from bridge.training.contracts.data import DataShard

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@runtime_checkable
class ModelRanks(Protocol):
    """The division of a model over the ranks, as seen from this rank.

    There are two ways. Either every rank holds a part of every module, in megatron-core's own
    groups (`bridge.training.ranks.model_ranks`). Or each module has ranks of its own, and the model
    section provides the object (`PlacesModules`).
    """

    @property
    def pg_collection(self) -> Any:
        """The process groups as megatron-core's schedules and `ModelConfig.build` take them."""

    @property
    def groups(self) -> "ProcessGroupCollection":
        """The process groups of what this rank holds of the model."""

    @property
    def replicas(self) -> int:
        """Data-parallel replicas of the model, over which train.global_batch_size is divided."""

    @property
    def stage(self) -> int:
        """This rank's stage in the pipeline, from 0 on."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the end of the pipeline, where losses are known."""

    @property
    def reports_losses(self) -> bool:
        """Whether this rank's losses and tokens count: no two such ranks have the same tokens."""

    @property
    def modules_with_inputs(self) -> frozenset[str] | None:
        """The modules whose inputs this rank reads; None for all."""

    @property
    def smallest_microbatch(self) -> int:
        """Samples of which a replica's microbatch must be a multiple, 1 in most layouts."""

    def shard(self, micro_batch_size: int) -> DataShard:
        """Return which part of each global microbatch this rank reads."""

    def to_16_bits(self, chunks: list[Any]) -> list[Any]:
        """Return the chunks in the 16-bit type of their config, if it has one.

        An implementation may leave this to `wrap_model`.
        """

    def wrap_model(
        self, chunks: list[Any], wrap: Callable[[list[Any], Any], list[Any]]
    ) -> list[Any]:
        """Return the chunks, with the modules that this rank trains wrapped in DDP.

        Args:
            chunks: This rank's model chunks.
            wrap: Wraps modules that share a megatron-core TransformerConfig, its second argument.
        """

    def build_optimizer(
        self, optimizer_config: Any, modules: list[Any], overrides: dict[Any, Any]
    ) -> Any:
        """Return the optimizer of the model's weights.

        Args:
            optimizer_config: megatron-core's OptimizerConfig.
            modules: The DDP wrappers on this rank; empty where nothing is trained.
            overrides: The settings of parameter groups that differ from the config, as
                megatron-core takes them.
        """

    def schedule(self, chunks: list[Any]) -> Callable[..., list[Any]]:
        """Return megatron-core's schedule for the chunks, with groups and communicator given."""

    def sum_tokens(self, num_tokens: torch.Tensor) -> None:
        """Replace the token count of the last stages by the sum over them, on every rank."""

    def gradient_factor(self, *, summed: bool) -> float:
        """Return the factor that this rank's gradients need once they are reduced.

        Args:
            summed: Whether they are the sum over data-parallel ranks; else they are the mean.
        """


@runtime_checkable
class PlacesModules(Protocol):
    """A model section whose modules may have ranks of their own."""

    def module_ranks(
        self, *, world_size: int, timeout: timedelta
    ) -> AbstractContextManager[ModelRanks] | None:
        """Return a context with the modules' process groups; entering it is a collective.

        None where every rank holds a part of every module, in megatron-core's own groups.

        Args:
            world_size: Ranks of the run.
            timeout: How long a collective may take.
        """
