"""The placement of a multimodal model: the ranks of each module."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bridge.mimo.sections import ModuleParallelism

LANGUAGE = "language"
"""The name of the language model among the modules, in megatron-core too."""


@dataclass(frozen=True, kw_only=True)
class ModulePlacement:
    """The consecutive ranks of one module: tensor-parallel ranks, then stages, then replicas."""

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
        """Return stage, replica and tensor-parallel rank of a rank."""
        index, tensor = divmod(rank - self.offset, self.tensor)
        replica, stage = divmod(index, self.pipeline)
        return f"s{stage} r{replica} t{tensor}"


def place_modules(
    modules: Mapping[str, ModuleParallelism], world_size: int
) -> tuple[dict[str, ModulePlacement], list[str]]:
    """Place modules on separate ranks, and derive the sizes that their settings leave open.

    Modules without a number of replicas get the same number each, as many as fit on the remaining
    ranks. A module without an offset begins where the module before it ends.

    Args:
        modules: The settings by name, in the order of the ranks: encoders first.
        world_size: Number of ranks.

    Returns:
        The ranks of each module (one replica where the sizes are wrong), and the problems, one line
        each.
    """
    problems = [
        f"model.parallelism.{name}.{field}={value}: must be at least {low}; raise it"
        for name, given in modules.items()
        for field, value, low in (
            ("tensor_model_parallel_size", given.tensor_model_parallel_size, 1),
            ("pipeline_model_parallel_size", given.pipeline_model_parallel_size, 1),
            ("data_parallel_size", given.data_parallel_size, 1),
            ("rank_offset", given.rank_offset, 0),
        )
        if value is not None and value < low
    ]
    if problems:
        return {}, problems
    replicas = _derive_replicas(modules, world_size)
    if isinstance(replicas, str):
        problems.append(replicas)
        replicas = {name: given.data_parallel_size or 1 for name, given in modules.items()}
    placements, end = {}, 0
    for name, given in modules.items():
        offset = end if given.rank_offset is None else given.rank_offset
        placements[name] = ModulePlacement(
            offset=offset,
            tensor=given.tensor_model_parallel_size or 1,
            pipeline=given.pipeline_model_parallel_size,
            data=replicas[name],
        )
        end = offset + placements[name].size
    if not problems:
        problems += _tiling_problems(placements, world_size)
        problems += _replica_problems(placements)
    return placements, problems


def _ranks_of_replica(given: ModuleParallelism) -> int:
    return (given.tensor_model_parallel_size or 1) * given.pipeline_model_parallel_size


def _derive_replicas(
    modules: Mapping[str, ModuleParallelism], world_size: int
) -> dict[str, int] | str:
    """Return the number of replicas of each module, or the problem if they cannot be derived."""
    known = {
        name: given.data_parallel_size
        for name, given in modules.items()
        if given.data_parallel_size is not None
    }
    taken = sum(_ranks_of_replica(modules[name]) * replicas for name, replicas in known.items())
    open_names = [name for name in modules if name not in known]
    if not open_names:
        return known
    left = world_size - taken
    each = sum(_ranks_of_replica(modules[name]) for name in open_names)
    if left < each or left % each:
        return (
            f"model.parallelism.{open_names[-1]}.data_parallel_size=null: {left} of the "
            f"{world_size} ranks are left for {' and '.join(open_names)}, whose replicas take "
            f"{each} together; give data_parallel_size of each, or another number of ranks"
        )
    return {**known, **dict.fromkeys(open_names, left // each)}


def _tiling_problems(placements: Mapping[str, ModulePlacement], world_size: int) -> Iterator[str]:
    """Yield the problems of ranks without a module, with two modules, and that do not exist."""
    holders = {
        rank: [name for name, placement in placements.items() if rank in placement.ranks]
        for rank in range(
            max(world_size, *(placement.ranks.stop for placement in placements.values()))
        )
    }
    idle = [rank for rank, names in holders.items() if not names and rank < world_size]
    if idle:
        yield (
            f"model.parallelism: no module is on {name_ranks(idle)} of {world_size}; raise a "
            "data_parallel_size, change a rank_offset, or start fewer ranks"
        )
    for pair in dict.fromkeys(tuple(names) for names in holders.values() if len(names) > 1):
        shared = [rank for rank, names in holders.items() if tuple(names) == pair]
        yield (
            f"model.parallelism: {' and '.join(pair)} are both on {name_ranks(shared)}; change "
            f"model.parallelism.{pair[-1]}.rank_offset, or set model.placement=colocated"
        )
    absent = [rank for rank, names in holders.items() if names and rank >= world_size]
    if absent:
        names = " and ".join(dict.fromkeys(name for rank in absent for name in holders[rank]))
        yield (
            f"model.parallelism: {names} would be on {name_ranks(absent)}, and there are "
            f"{world_size} ranks; start {absent[-1] + 1}, or lower the sizes"
        )


def _replica_problems(placements: Mapping[str, ModulePlacement]) -> Iterator[str]:
    language = placements[LANGUAGE].data
    for name, placement in placements.items():
        if language % placement.data and placement.data % language:
            yield (
                f"model.parallelism.{name}.data_parallel_size={placement.data}: is neither a "
                f"multiple nor a divisor of the language model's {language}, over whose "
                "replicas the samples are divided; change one of them"
            )


def name_ranks(ranks: list[int]) -> str:
    """Return ranks as text, such as "ranks 0 to 3"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
