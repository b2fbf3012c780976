"""On which ranks each module of a multimodal model is, and a picture of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bridge.mimo.sections import ModuleParallelism

LANGUAGE = "language"
"""The name of the language model among the modules, in megatron-core too."""

_COLUMNS, _MOST_COLUMNS = 8, 32
"""Ranks beside each other in a picture, and those of the largest."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The ranks of one module: neighbours, the tensor-parallel ones first, the replicas last."""

    offset: int
    tensor: int
    pipeline: int
    data: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    @property
    def ranks(self) -> range:
        """The ranks."""
        return range(self.offset, self.offset + self.size)

    def label(self, rank: int) -> str:
        """Return what a rank is of the module: stage, replica and tensor-parallel rank."""
        place = rank - self.offset
        tensor, place = place % self.tensor, place // self.tensor
        stage, replica = place % self.pipeline, place // self.pipeline
        return f"s{stage} r{replica} t{tensor}"


def separate_places(
    modules: Mapping[str, ModuleParallelism], world_size: int
) -> tuple[dict[str, Place], list[str]]:
    """Place modules on ranks of their own, and fill in what their settings leave open.

    A module without a number of copies gets as many as the ranks that are left over hold, the same
    for each such module; one without an offset begins where the module before it ends.

    Args:
        modules: What is asked for, by name, in the order of the ranks: encoders first.
        world_size: Number of ranks.

    Returns:
        Where each module is (a module whose sizes are wrong has one copy), and a line for each
        reason why that will not do.
    """
    problems = [
        f"model.parallelism.{name}.{field}: {value}; give a number of at least {low}"
        for name, asked in modules.items()
        for field, value, low in (
            ("tensor_model_parallel_size", asked.tensor_model_parallel_size, 1),
            ("pipeline_model_parallel_size", asked.pipeline_model_parallel_size, 1),
            ("data_parallel_size", asked.data_parallel_size, 1),
            ("rank_offset", asked.rank_offset, 0),
        )
        if value is not None and value < low
    ]
    if problems:
        return {}, problems
    copies = _copies(modules, world_size)
    if isinstance(copies, str):
        problems.append(copies)
        copies = {name: asked.data_parallel_size or 1 for name, asked in modules.items()}
    places, end = {}, 0
    for name, asked in modules.items():
        offset = end if asked.rank_offset is None else asked.rank_offset
        places[name] = Place(
            offset=offset,
            tensor=asked.tensor_model_parallel_size or 1,
            pipeline=asked.pipeline_model_parallel_size,
            data=copies[name],
        )
        end = offset + places[name].size
    if not problems:
        problems += _tiling_problems(places, world_size)
        problems += _copies_problems(places)
    return places, problems


def _ranks_of_a_copy(asked: ModuleParallelism) -> int:
    return (asked.tensor_model_parallel_size or 1) * asked.pipeline_model_parallel_size


def _copies(modules: Mapping[str, ModuleParallelism], world_size: int) -> dict[str, int] | str:
    """Return the number of copies of each module, or why it does not follow."""
    known = {
        name: asked.data_parallel_size
        for name, asked in modules.items()
        if asked.data_parallel_size is not None
    }
    taken = sum(_ranks_of_a_copy(modules[name]) * copies for name, copies in known.items())
    open_names = [name for name in modules if name not in known]
    if not open_names:
        return known
    left = world_size - taken
    each = sum(_ranks_of_a_copy(modules[name]) for name in open_names)
    if left < each or left % each:
        return (
            f"model.parallelism.{open_names[-1]}.data_parallel_size: {left} of the {world_size} "
            f"ranks are left for {' and '.join(open_names)}, whose copies take {each} together; "
            "give data_parallel_size of each, or another number of ranks"
        )
    return {**known, **dict.fromkeys(open_names, left // each)}


def _tiling_problems(places: Mapping[str, Place], world_size: int) -> Iterator[str]:
    """Yield ranks that no module has, that two have, and that there are not."""
    holders = {
        rank: [name for name, place in places.items() if rank in place.ranks]
        for rank in range(max(world_size, *(place.ranks.stop for place in places.values())))
    }
    idle = [rank for rank, names in holders.items() if not names and rank < world_size]
    if idle:
        yield (
            f"model.parallelism: no module is on {_ranks(idle)} of {world_size}; raise a "
            "data_parallel_size, change a rank_offset, or start fewer ranks"
        )
    for pair in dict.fromkeys(tuple(names) for names in holders.values() if len(names) > 1):
        shared = [rank for rank, names in holders.items() if tuple(names) == pair]
        yield (
            f"model.parallelism: {' and '.join(pair)} are both on {_ranks(shared)}; change "
            f"model.parallelism.{pair[-1]}.rank_offset, or set model.placement=colocated"
        )
    absent = [rank for rank, names in holders.items() if names and rank >= world_size]
    if absent:
        names = " and ".join(dict.fromkeys(name for rank in absent for name in holders[rank]))
        yield (
            f"model.parallelism: {names} would be on {_ranks(absent)}, and there are {world_size} "
            f"ranks; start {absent[-1] + 1}, or lower the sizes"
        )


def _copies_problems(places: Mapping[str, Place]) -> Iterator[str]:
    language = places[LANGUAGE].data
    for name, place in places.items():
        if language % place.data and place.data % language:
            yield (
                f"model.parallelism.{name}.data_parallel_size: {place.data} is neither a multiple "
                f"nor a divisor of the language model's {language}, between whose copies the "
                "samples are divided; change one of them"
            )


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def picture(places: Mapping[str, Place], world_size: int) -> str:
    """Draw which rank is what of each module: a column for each rank.

    Ranks beyond those that there are stand in brackets. Where there are many, a line a module says
    the same.
    """
    number = max(world_size, *(place.ranks.stop for place in places.values()))
    if number > _MOST_COLUMNS:
        return "\n".join(
            f"{name}  {_ranks(list(place.ranks))}: {place.tensor} tensor-parallel x "
            f"{place.pipeline} stages x {place.data} replicas"
            for name, place in places.items()
        )
    blocks = [
        _block(places, range(first, min(first + _COLUMNS, number)), world_size)
        for first in range(0, number, _COLUMNS)
    ]
    return "\n".join([*blocks, "(s pipeline stage, r replica, t tensor-parallel rank)"])


def _block(places: Mapping[str, Place], ranks: range, world_size: int) -> str:
    rows = [["rank", *(str(rank) if rank < world_size else f"({rank})" for rank in ranks)]]
    for name, place in places.items():
        cells = [place.label(rank) if rank in place.ranks else "." for rank in ranks]
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
