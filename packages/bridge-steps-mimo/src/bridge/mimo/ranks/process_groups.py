"""The process groups of modules on separate ranks: a HyperCommGrid for each module."""

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from bridge.mimo.ranks.placement import LANGUAGE, ModulePlacement
from bridge.mimo.ranks.separate_ranks import SeparateRanks
from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import ensure_global_memory_buffer, own_bridge_groups

with quiet_import():
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection

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
def open_process_groups(
    placements: Mapping[str, ModulePlacement], timeout: timedelta
) -> Iterator[SeparateRanks]:
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
