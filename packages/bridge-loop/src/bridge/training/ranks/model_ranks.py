"""The division of a model over the ranks (`ModelRanks`), from process groups of either kind."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from bridge.training.contracts import DataShard, ModelRanks

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def to_model_ranks(pg_collection: "ProcessGroupCollection | ModelRanks") -> ModelRanks:
    """Return the division of the model over the ranks, from a caller's process groups.

    Args:
        pg_collection: megatron-core's, or the object of `PlacesModules.module_ranks`.
    """
    return pg_collection if isinstance(pg_collection, ModelRanks) else SharedRanks(pg_collection)


class SharedRanks:
    """Ranks of which each holds a part of every module, in megatron-core's own groups.

    Args:
        groups: This rank's process groups.
    """

    modules_with_inputs: frozenset[str] | None = None
    smallest_microbatch: int = 1

    def __init__(self, groups: "ProcessGroupCollection") -> None:
        self.groups = groups

    @property
    def pg_collection(self) -> "ProcessGroupCollection":
        """The process groups."""
        return self.groups

    @property
    def replicas(self) -> int:
        """Data-parallel replicas."""
        return int(self.groups.dp.size())

    @property
    def stage(self) -> int:
        """This rank's stage in the pipeline, from 0 on."""
        return int(self.groups.pp.rank())

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the end of the pipeline."""
        return bool(self.groups.pp.rank() == self.groups.pp.size() - 1)

    @property
    def reports_losses(self) -> bool:
        """Whether this is the first tensor-parallel rank of the last stage."""
        return self.is_last_stage and self.groups.tp.rank() == 0

    def shard(self, micro_batch_size: int) -> DataShard:
        """Return this replica's microbatch."""
        replicas = self.groups.dp
        return DataShard(rank=replicas.rank(), size=replicas.size(), samples=micro_batch_size)

    def to_16_bits(self, chunks: list[Any]) -> list[Any]:
        """Wrap the chunks for 16 bits where their config says so."""
        from megatron.core.transformer.module import Float16Module

        model_config = chunks[0].config
        if not model_config.bf16 and not model_config.fp16:
            return chunks
        return [Float16Module(model_config, chunk) for chunk in chunks]

    def wrap_model(
        self, chunks: list[Any], wrap: Callable[[list[Any], Any], list[Any]]
    ) -> list[Any]:
        """Wrap all chunks, which share a config."""
        return wrap(chunks, chunks[0].config)

    def build_optimizer(
        self, optimizer_config: Any, modules: list[Any], overrides: dict[Any, Any]
    ) -> Any:
        """Return megatron-core's optimizer."""
        from megatron.core.optimizer import get_megatron_optimizer

        # Without a collection it takes megatron-core's own groups. Checkpoints gather over some of
        # those, over gloo, for which a collection has no field.
        return get_megatron_optimizer(optimizer_config, modules, overrides)

    def schedule(self, chunks: list[Any]) -> Callable[..., list[Any]]:
        """Return megatron-core's schedule for the number of stages and chunks."""
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
        from megatron.core.utils import get_model_config

        stages, virtual_stages = self.groups.pp, len(chunks) if len(chunks) > 1 else None
        communicator = None
        if stages.size() > 1:
            communicator = P2PCommunicator(stages, get_model_config(chunks[0]))
        return partial(
            get_forward_backward_func(pp_size=stages.size(), vp_size=virtual_stages),
            pg_collection=self.groups,
            p2p_communicator=communicator,
        )

    def sum_tokens(self, num_tokens: torch.Tensor) -> None:
        """Sum the last stages' counts over data- and context-parallel ranks, for all stages."""
        pipeline = self.groups.pp
        last_stage = dist.get_process_group_ranks(pipeline)[-1]
        dist.broadcast(num_tokens, src=last_stage, group=pipeline)
        dist.all_reduce(num_tokens, group=self.groups.dp_cp)

    def gradient_factor(self, *, summed: bool) -> float:
        """Return 1: all modules have the same replicas."""
        return 1.0
