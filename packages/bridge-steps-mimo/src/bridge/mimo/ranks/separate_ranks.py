"""A model with one module on each rank, as the loop sees it: shard, stage, schedule, optimizer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist

from bridge.mimo.ranks.communicator import ModuleCommunicator
from bridge.mimo.ranks.optimizer import ModulesOptimizer
from bridge.mimo.ranks.placement import LANGUAGE, ModulePlacement
from bridge.training.contracts import DataShard
from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.optimizer import ModuleOptimizerInfo
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import (
        MultiModuleProcessGroupCollection,
        ProcessGroupCollection,
    )
    from megatron.core.utils import get_model_config


class SeparateRanks(MultiModuleProcessGroupCollection):
    """`ModelRanks` of a rank that has one of several modules.

    Args:
        name: The module on this rank.
        own: Its process groups.
        grids: The ranks of every module as megatron-core's grids, encoders first.
        placements: The ranks of every module.
    """

    def __init__(
        self,
        name: str,
        own: ProcessGroupCollection,
        grids: Mapping[str, HyperCommGrid],
        placements: Mapping[str, ModulePlacement],
    ) -> None:
        super().__init__({name: own}, LANGUAGE if name == LANGUAGE else None)
        self.name = name
        self.groups = own
        self.grids = dict(grids)
        self._placements = placements
        self._communicator: ModuleCommunicator | None = None

    @property
    def pg_collection(self) -> Self:
        """The process groups as megatron-core takes them: these."""
        return self

    @property
    def replicas(self) -> int:
        """Replicas of the language model, over which a global batch is divided."""
        return self._placements[LANGUAGE].data

    @property
    def stage(self) -> int:
        """This rank's stage. Encoders are parallel; the language model's stages follow theirs."""
        stage = int(self.groups.pp.rank())
        if self.name == LANGUAGE:
            encoders = [name for name in self._placements if name != LANGUAGE]
            stage += max((self._placements[name].pipeline for name in encoders), default=0)
        return stage

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the language model's last stage."""
        pipeline = self.groups.pp
        return self.name == LANGUAGE and bool(pipeline.rank() == pipeline.size() - 1)

    @property
    def reports_losses(self) -> bool:
        """Whether this is the first tensor-parallel rank of the last stage."""
        return self.is_last_stage and self.groups.tp.rank() == 0

    @property
    def modules_with_inputs(self) -> frozenset[str]:
        """The module on this rank, if this is its first stage."""
        return frozenset({self.name} if self.groups.pp.rank() == 0 else ())

    def shard(self, micro_batch_size: int) -> DataShard:
        """Return this rank's shard of a global microbatch, divided over its module's replicas."""
        replicas: int = self.groups.dp.size()
        samples = micro_batch_size * self.replicas // replicas
        return DataShard(rank=self.groups.dp.rank(), size=replicas, samples=samples)

    @property
    def smallest_microbatch(self) -> int:
        """Samples of which a microbatch of the language model must be a multiple.

        Modules with more replicas divide it among them.
        """
        return max(1, *(placement.data // self.replicas for placement in self._placements.values()))

    def to_16_bits(self, chunks: list[Any]) -> list[Any]:
        """Return the chunks as they are: `wrap_model` converts the module on this rank."""
        return chunks

    def wrap_model(
        self, chunks: list[Any], wrap: Callable[[list[Any], Any], list[Any]]
    ) -> list[Any]:
        """Wrap the module on this rank in DDP, and put it back into the model."""
        for chunk in chunks:
            module, module_config = chunk.own_module()
            if module_config.bf16:
                # Not megatron-core's wrapper, whose float32 outputs would be sent to other ranks.
                module = module.bfloat16()
            [wrapped] = wrap([module], module_config)
            chunk.replace_own_module(wrapped)
        return chunks

    def build_optimizer(
        self, optimizer_config: Any, modules: list[Any], overrides: dict[Any, Any]
    ) -> ModulesOptimizer:
        """Return the optimizer of all modules, with the weights of this rank's module."""
        infos = {
            name: ModuleOptimizerInfo(
                optimizer=None, grid=grid, pg_collection=None, is_active=name == self.name
            )
            for name, grid in self.grids.items()
        }
        infos[self.name].pg_collection = self.groups
        if modules:
            infos[self.name].optimizer = get_megatron_optimizer(
                optimizer_config,
                modules,
                overrides,
                use_gloo_process_groups=False,
                pg_collection=self.groups,
            )
        return ModulesOptimizer(infos, optimizer_config)

    def schedule(self, chunks: list[Any]) -> Callable[..., list[Any]]:
        """Return megatron-core's schedule between modules; the first call is a collective."""
        return partial(
            get_forward_backward_func(schedule_pg_collection=self),
            pg_collection=self,
            p2p_communicator=self._communicator_for(get_model_config(chunks[0])),
        )

    def _communicator_for(self, model_config: Any) -> ModuleCommunicator:
        """Return the communicator between stages and modules, the same one at every call."""
        if self._communicator is None:
            encoders = [name for name in self.grids if name != LANGUAGE]
            axes: Any = {"s": 0, "b": 1, "h": 2}
            self._communicator = ModuleCommunicator(
                self.grids,
                {**{name: [LANGUAGE] for name in encoders}, LANGUAGE: []},
                model_config,
                dim_mapping=axes,
                # The embeddings of all samples' images, concatenated: [tokens, hidden].
                module_output_ndim=dict.fromkeys(encoders, 2),
            )
        return self._communicator

    def sum_tokens(self, num_tokens: torch.Tensor) -> None:
        """Sum the token counts of the ranks where the language model ends, on every rank."""
        if not self.reports_losses:
            # Tensor-parallel ranks have the same tokens.
            num_tokens.zero_()
        dist.all_reduce(num_tokens)

    def gradient_factor(self, *, summed: bool) -> float:
        """Return the factor from a mean over this module's replicas to the language model's.

        A replica of an encoder has the gradients of the samples of several replicas of the language
        model, or of some samples of one.
        """
        return 1.0 if summed else self.groups.dp.size() / self.replicas
