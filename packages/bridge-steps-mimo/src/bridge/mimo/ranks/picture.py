"""A picture of the placement: a column for each rank, a line for each module."""

from collections.abc import Mapping

from bridge.mimo.ranks.placement import ModulePlacement, name_ranks

_COLUMNS, _MOST_COLUMNS = 8, 32
"""Ranks in a line of a picture, and the most ranks that are drawn."""


def draw_placement(placements: Mapping[str, ModulePlacement], world_size: int) -> str:
    """Draw stage, replica and tensor-parallel rank of each rank, one column a rank.

    Ranks that do not exist are in brackets. For many ranks the picture is one line a module.
    """
    number = max(world_size, *(placement.ranks.stop for placement in placements.values()))
    if number > _MOST_COLUMNS:
        return "\n".join(
            f"{name}  {name_ranks(list(placement.ranks))}: {placement.tensor} tensor-parallel x "
            f"{placement.pipeline} stages x {placement.data} replicas"
            for name, placement in placements.items()
        )
    blocks = [
        _block(placements, range(first, min(first + _COLUMNS, number)), world_size)
        for first in range(0, number, _COLUMNS)
    ]
    return "\n".join([*blocks, "(s pipeline stage, r replica, t tensor-parallel rank)"])


def _block(placements: Mapping[str, ModulePlacement], ranks: range, world_size: int) -> str:
    rows = [["rank", *(str(rank) if rank < world_size else f"({rank})" for rank in ranks)]]
    for name, placement in placements.items():
        cells = [placement.label(rank) if rank in placement.ranks else "." for rank in ranks]
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
