"""The training, validation and test data of a run, the same on every rank."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch.utils.data import Subset

from bridge.training.contracts import DataSplits, SizedDataset, named_sets
from bridge.training.ranks.collectives import from_every_rank
from bridge.training.usage_error import UsageError


def as_splits(built: DataSplits | Sequence[SizedDataset | None]) -> DataSplits:
    """Return `DataSplits` of a dataset's result, which may be train, validation and test data.

    Args:
        built: The result of ``dataset.build``.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(built, DataSplits):
        return built
    if not isinstance(built, Sequence) or not 1 <= len(built) <= 3:
        raise UsageError(
            "dataset.build: expected DataSplits or a sequence of train, validation and test data, "
            f"got {type(built).__name__}"
        )
    train, validation, test = [*built, None, None][:3]
    return DataSplits(train=train, validation=validation, test=test)


def cut_to_the_smallest(
    splits: DataSplits, control_group: dist.ProcessGroup
) -> tuple[DataSplits, list[str]]:
    """Cut each set to its smallest size on any rank; a collective over all ranks.

    Ranks that know another size would draw in another order, and end at another time.

    Args:
        splits: The result of this rank's dataset.
        control_group: All ranks, over gloo.

    Returns:
        The splits, and a line for each set that was cut on some rank.

    Raises:
        UsageError: One rank has data that another lacks; on every rank.
    """
    everyone = from_every_rank(_sizes(splits), control_group)
    notes, smallest = [], {}
    for name in dict.fromkeys(name for sizes in everyone for name in sizes):
        sizes = [sizes_of_rank.get(name, 0) for sizes_of_rank in everyone]
        low, high = min(sizes), max(sizes)
        if low == high:
            continue
        described = (
            f"{name} data has {low} samples on rank {sizes.index(low)} and {high} on rank "
            f"{sizes.index(high)}"
        )
        if low == 0:
            raise UsageError(f"dataset: {described}; build the same splits on every rank")
        smallest[name] = low
        notes.append(f"warning: {described}: the first {low} count on every rank")

    if not smallest:
        return splits, notes

    def cut(name: str, dataset: Any) -> Any:
        return Subset(dataset, range(smallest[name])) if name in smallest else dataset

    def cut_all(split: Literal["validation", "test"]) -> Any:
        data = getattr(splits, split)
        if isinstance(data, Mapping):
            return {name: cut(f"{split}/{name}", dataset) for name, dataset in data.items()}
        return cut(split, data)

    cut_splits = dataclasses.replace(
        splits,
        train=cut("train", splits.train),
        validation=cut_all("validation"),
        test=cut_all("test"),
    )
    return cut_splits, notes


def _sizes(splits: DataSplits) -> dict[str, int]:
    sizes = {"train": 0 if splits.train is None else len(splits.train)}
    for split in ("validation", "test"):
        sets = named_sets(split, getattr(splits, split))
        sizes |= {name: len(dataset) for name, dataset in sets.items()}
    return sizes
