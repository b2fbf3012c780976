"""The process groups of modules on ranks of their own, and what travels between the modules.

All of it is megatron-core's: a HyperCommGrid for each module, its MultiModulePipelineCommunicator
between them, a MimoOptimizer over them.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Self, override

import torch
import torch.distributed as dist

from bridge.mimo.optimizer import ModulesOptimizer
from bridge.mimo.placement import LANGUAGE, Place
from bridge.training.contracts import DataShard
from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import (
    bridge_batch_dimension,
    ensure_global_memory_buffer,
    mark_split_sizes,
    own_bridge_groups,
)

with quiet_import():
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator, CommRole
    from megatron.core.pipeline_parallel.multimodule_communicator import (
        MultiModulePipelineCommunicator,
    )
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
def module_ranks_of(places: Mapping[str, Place], timeout: timedelta) -> Iterator["SeparateRanks"]:
    """Bring up the groups of all modules, and take them down; a collective over all ranks.

    Args:
        places: Where each module is; together they take every rank once.
        timeout: How long a collective may take.
    """
    # Every rank makes all groups, also those that it is not in, in one order.
    grids = {name: _grid_at(place, timeout) for name, place in places.items()}
    collections = {name: _collection(name, grid, timeout) for name, grid in grids.items()}
    name = next(name for name, place in places.items() if dist.get_rank() in place.ranks)
    # The loop gives the globals back as they were.
    ensure_global_memory_buffer()
    try:
        with own_bridge_groups():
            yield SeparateRanks(name, collections[name][0], grids, places)
    finally:
        for _, ends in collections.values():
            for group in ends:
                dist.destroy_process_group(group)
        for grid in grids.values():
            grid.destroy()


class SeparateRanks(MultiModuleProcessGroupCollection):
    """What the loop asks about a rank that holds one of several modules (`ModelRanks`).

    Args:
        name: The module on this rank.
        own: Its process groups.
        grids: Those of every module, encoders first.
        places: Where each module is.
    """

    def __init__(
        self,
        name: str,
        own: ProcessGroupCollection,
        grids: Mapping[str, HyperCommGrid],
        places: Mapping[str, Place],
    ) -> None:
        super().__init__({name: own}, LANGUAGE if name == LANGUAGE else None)
        self.name = name
        self.groups = own
        self.grids = dict(grids)
        self._places = places
        self._communicator: _Communicator | None = None

    @property
    def pg_collection(self) -> Self:
        """The process groups as megatron-core takes them: these."""
        return self

    @property
    def replicas(self) -> int:
        """Copies of the language model, which the samples of a global batch are divided over."""
        return self._places[LANGUAGE].data

    @property
    def stage(self) -> int:
        """This rank's place in the pipeline: encoders are side by side, the language model last."""
        before = 0
        if self.name == LANGUAGE:
            before = max(
                (place.pipeline for name, place in self._places.items() if name != LANGUAGE),
                default=0,
            )
        return before + int(self.groups.pp.rank())

    @property
    def is_last_stage(self) -> bool:
        """Whether the language model ends here."""
        pipeline = self.groups.pp
        return self.name == LANGUAGE and bool(pipeline.rank() == pipeline.size() - 1)

    @property
    def modules_with_inputs(self) -> frozenset[str]:
        """The module on this rank, if it begins here."""
        return frozenset({self.name} if self.groups.pp.rank() == 0 else ())

    def shard(self, micro_batch_size: int) -> DataShard:
        """Return this rank's part of the samples of all copies of the language model."""
        copies: int = self.groups.dp.size()
        samples = micro_batch_size * self.replicas // copies
        return DataShard(rank=self.groups.dp.rank(), size=copies, samples=samples)

    @property
    def smallest_microbatch(self) -> int:
        """Samples of which a microbatch of the language model holds a multiple.

        Modules with more replicas divide it among them.
        """
        return max(1, *(place.data // self.replicas for place in self._places.values()))

    def to_16_bits(self, chunks: list[Any]) -> list[Any]:
        """Return the chunks as they are: `wrap_model` converts the module on this rank."""
        return chunks

    def wrap_model(
        self, chunks: list[Any], wrap: Callable[[list[Any], Any], list[Any]]
    ) -> list[Any]:
        """Wrap the module on this rank; the model around it stays as it was built."""
        for chunk in chunks:
            module, module_config = chunk.own_module()
            if module_config.bf16:
                # Not by megatron-core's wrapper, whose float32 outputs would travel to other ranks.
                module = module.bfloat16()
            [wrapped] = wrap([module], module_config)
            chunk.replace_own_module(wrapped)
        return chunks

    def build_optimizer(
        self, optimizer_config: Any, modules: list[Any], overrides: dict[Any, Any]
    ) -> ModulesOptimizer:
        """Return the optimizer of all modules' weights, of which this rank has some."""
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

    def _communicator_for(self, model_config: Any) -> MultiModulePipelineCommunicator:
        """Return what sends tensors between stages and modules, the same at every call."""
        if self._communicator is None:
            encoders = [name for name in self.grids if name != LANGUAGE]
            axes: Any = {"s": 0, "b": 1, "h": 2}
            self._communicator = _Communicator(
                self.grids,
                {**{name: [LANGUAGE] for name in encoders}, LANGUAGE: []},
                model_config,
                dim_mapping=axes,
                # Of images, [tokens, hidden], those of all samples one after the other.
                module_output_ndim=dict.fromkeys(encoders, 2),
            )
        return self._communicator

    def sum_tokens(self, num_tokens: torch.Tensor) -> None:
        """Sum the token counts of the ranks where the language model ends, on every rank."""
        if not (self.is_last_stage and self.groups.tp.rank() == 0):
            # Tensor-parallel ranks have seen the same tokens.
            num_tokens.zero_()
        dist.all_reduce(num_tokens)

    def gradient_factor(self, *, summed: bool) -> float:
        """Return what makes a mean over this module's copies one over the language model's.

        A copy of an encoder has the gradients of the samples of several copies of the language
        model, or of a part of one's.
        """
        return 1.0 if summed else self.groups.dp.size() / self.replicas


class _Communicator(MultiModulePipelineCommunicator):
    """megatron-core's, with our bridges between the modules."""

    @override
    def _build_bridge_comms(self) -> None:
        for source, targets in self.topology.items():
            for target in targets:
                bridge = _Bridge(
                    self.module_to_grid_map[source],
                    self.module_to_grid_map[target],
                    dim_mapping=self.dim_mapping,
                    comm_dtype=self.config.pipeline_dtype,
                    src_module_name=source,
                    dest_module_name=target,
                    tensor_ndim=self.module_output_ndim[source],
                )
                self.bridge_comms.append(bridge)


class _Bridge(BridgeCommunicator):
    """megatron-core's, for encoders with more copies than the language model has.

    A copy of the language model then puts together what several ranks have encoded, of which each
    may have another number of tokens, and sends each the gradients of its own. megatron-core would
    divide them into equal parts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The parts of each microbatch whose gradients are still to be sent, the oldest first.
        self._received: deque[list[int]] = deque()
        self._trains = False
        super().__init__(*args, **kwargs)

    @override
    def recv_forward(self) -> torch.Tensor:
        """Receive the embeddings of a microbatch."""
        return self._receive(super().recv_forward)

    @override
    def send_backward(self, grad_tensor: torch.Tensor) -> None:
        """Send each rank the gradients of its embeddings."""
        self._mark(grad_tensor)
        super().send_backward(grad_tensor)

    @override
    def send_backward_recv_forward(
        self, grad_tensor: torch.Tensor, forward_shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Send each rank the gradients of its embeddings; receive those of another microbatch."""
        self._mark(grad_tensor)
        return self._receive(partial(super().send_backward_recv_forward, grad_tensor))

    def _receive(self, receive: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._trains = torch.is_grad_enabled()
        # Gradients end at what was received: torch knows none of a broadcast, and warns.
        with torch.no_grad():
            received = receive()
        return received.detach().requires_grad_(self._trains)

    @override
    def _communicate_shapes(self, *args: Any, **kwargs: Any) -> Any:
        forward, backward = super()._communicate_shapes(*args, **kwargs)
        if forward and self._trains:
            dimension = bridge_batch_dimension(self)
            self._received.append([shape[dimension] for shape in forward])
        return forward, backward

    def _mark(self, gradient: torch.Tensor) -> None:
        if self.comm_map[self.current_rank].role is CommRole.RECEIVER:
            mark_split_sizes(gradient, self._received.popleft())


def _grid_at(place: Place, timeout: timedelta) -> HyperCommGrid:
    grid = HyperCommGrid(
        [place.tensor, 1, place.pipeline, place.data],
        ["tp", "cp", "pp", "dp"],
        rank_offset=place.offset,
    )
    grid.register_view(
        "expert",
        [place.tensor, 1, place.pipeline, place.data],
        ["expt_tp", "ep", "pp", "expt_dp"],
        shared_dims=["pp"],
    )
    for _, dimensions, view in _GROUPS:
        grid.create_pg(dimensions, view=view, timeout=timeout)
    return grid


def _collection(
    name: str, grid: HyperCommGrid, timeout: timedelta
) -> tuple[ProcessGroupCollection, list[Any]]:
    """Return the groups of a grid's rank, and those among them that the grid does not destroy."""
    groups: Any = ProcessGroupCollection()
    ends: list[Any] = []
    groups.embd = groups.pos_embd = None
    for line in grid.get_rank_enum("pp"):
        # Where tied embeddings are: at both ends of the language model.
        tied = dist.new_group(sorted({line[0], line[-1]}), timeout=timeout)
        first = dist.new_group([line[0]], timeout=timeout)
        mine = [group for group in (tied, first) if _is_member(group)]
        ends += mine
        if name == LANGUAGE and _is_member(tied):
            groups.embd = tied
        if _is_member(first):
            groups.pos_embd = first
    if grid.is_current_rank_in_grid():
        for field, dimensions, view in _GROUPS:
            setattr(groups, field, grid.get_pg(dimensions, view=view))
        groups.intra_dp_cp, groups.intra_expt_dp = groups.dp_cp, groups.expt_dp
    return groups, ends


def _is_member(group: Any) -> bool:
    return group is not dist.GroupMember.NON_GROUP_MEMBER
