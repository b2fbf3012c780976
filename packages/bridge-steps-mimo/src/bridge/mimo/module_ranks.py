"""Modules with ranks of their own: their process groups, and how the loop trains them.

They are made of megatron-core's parts: a HyperCommGrid for each module, its
MultiModulePipelineCommunicator between them, and its MimoOptimizer over them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist

from bridge.mimo.communicator import ModuleCommunicator
from bridge.mimo.optimizer import ModulesOptimizer
from bridge.mimo.placement import LANGUAGE, ModulePlacement
from bridge.training.contracts import DataShard
from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import ensure_global_memory_buffer, own_bridge_groups

with quiet_import():
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import (
        MultiModuleProcessGroupCollection,
        ProcessGroupCollection,
    )
    from megatron.core.utils import get_model_config

_GROUPS: tuple[tuple[str, list[str], str | None], ...] = (
    ("tp", ["tp"], None),
    ("cp", ["cp"], None),
    ("pp", ["pp"], None),
    ("dp", ["dp"], None),
    ("dp_cp", ["dp", "cp"], None),
    ("mp", ["tp", "pp"], None),
    ("intra_dist_opt", ["tp", "cp", "dp", "pp"], None),
    ("ep", ["ep"], "expert"),
    ("expt_tp", ["expt_tp"], "expert"),
    ("expt_dp", ["expt_dp"], "expert"),
    ("tp_ep_pp", ["expt_tp", "ep", "pp"], "expert"),
)
"""Field of a ProcessGroupCollection, the grid's dimensions, and the view that has them."""


@contextlib.contextmanager
def module_ranks_of(
    placements: Mapping[str, ModulePlacement], timeout: timedelta
) -> Iterator["SeparateRanks"]:
    """Initialize the groups of all modules, and destroy them at the end; a collective.

    Args:
        placements: The ranks of each module; together every rank once.
        timeout: How long a collective may take.
    """
    # Every rank makes all groups, also those that it is not in, in the same order.
    grids = {name: _build_grid(placement, timeout) for name, placement in placements.items()}
    collections = {name: _collect_groups(name, grid, timeout) for name, grid in grids.items()}
    own_rank = dist.get_rank()
    name = next(name for name, placement in placements.items() if own_rank in placement.ranks)
    # The loop restores the globals at the end.
    ensure_global_memory_buffer()
    try:
        with own_bridge_groups():
            yield SeparateRanks(name, collections[name][0], grids, placements)
    finally:
        for _, groups_at_ends in collections.values():
            for group in groups_at_ends:
                dist.destroy_process_group(group)
        for grid in grids.values():
            grid.destroy()


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
        """This rank's stage: the language model's follow the encoders', which are parallel."""
        before = 0
        if self.name == LANGUAGE:
            before = max(
                (
                    placement.pipeline
                    for name, placement in self._placements.items()
                    if name != LANGUAGE
                ),
                default=0,
            )
        return before + int(self.groups.pp.rank())

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the language model's last stage."""
        pipeline = self.groups.pp
        return self.name == LANGUAGE and bool(pipeline.rank() == pipeline.size() - 1)

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
        own = None
        if modules:
            own = get_megatron_optimizer(
                optimizer_config,
                modules,
                overrides,
                use_gloo_process_groups=False,
                pg_collection=self.groups,
            )
        return ModulesOptimizer.over(self.grids, self.name, own, self.groups, optimizer_config)

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
                # Embeddings of images, [tokens, hidden], of all samples concatenated.
                module_output_ndim=dict.fromkeys(encoders, 2),
            )
        return self._communicator

    def sum_tokens(self, num_tokens: torch.Tensor) -> None:
        """Sum the token counts of the ranks where the language model ends, on every rank."""
        if not (self.is_last_stage and self.groups.tp.rank() == 0):
            # Tensor-parallel ranks have the same tokens.
            num_tokens.zero_()
        dist.all_reduce(num_tokens)

    def gradient_factor(self, *, summed: bool) -> float:
        """Return the factor from a mean over this module's replicas to the language model's.

        A replica of an encoder has the gradients of the samples of several replicas of the language
        model, or of a part of one's.
        """
        return 1.0 if summed else self.groups.dp.size() / self.replicas


def _build_grid(placement: ModulePlacement, timeout: timedelta) -> HyperCommGrid:
    grid = HyperCommGrid(
        [placement.tensor, 1, placement.pipeline, placement.data],
        ["tp", "cp", "pp", "dp"],
        rank_offset=placement.offset,
    )
    grid.register_view(
        "expert",
        [placement.tensor, 1, placement.pipeline, placement.data],
        ["expt_tp", "ep", "pp", "expt_dp"],
        shared_dims=["pp"],
    )
    for _, dimensions, view in _GROUPS:
        grid.create_pg(dimensions, view=view, timeout=timeout)
    return grid


def _collect_groups(
    name: str, grid: HyperCommGrid, timeout: timedelta
) -> tuple[ProcessGroupCollection, list[Any]]:
    """Return this rank's groups of a grid, and those among them that the grid does not destroy."""
    groups: Any = ProcessGroupCollection()
    groups_at_ends: list[Any] = []
    groups.embd = groups.pos_embd = None
    for line in grid.get_rank_enum("pp"):
        # Tied embeddings are at both ends of the language model.
        tied = dist.new_group(sorted({line[0], line[-1]}), timeout=timeout)
        first = dist.new_group([line[0]], timeout=timeout)
        mine = [group for group in (tied, first) if _is_member(group)]
        groups_at_ends += mine
        if name == LANGUAGE and _is_member(tied):
            groups.embd = tied
        if _is_member(first):
            groups.pos_embd = first
    if grid.is_current_rank_in_grid():
        for field, dimensions, view in _GROUPS:
            setattr(groups, field, grid.get_pg(dimensions, view=view))
        groups.intra_dp_cp, groups.intra_expt_dp = groups.dp_cp, groups.expt_dp
    return groups, groups_at_ends


def _is_member(group: Any) -> bool:
    return group is not dist.GroupMember.NON_GROUP_MEMBER
