"""The data of a run: what the loop asks of a dataset section, and what it gets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


@dataclass(kw_only=True, frozen=True)
class DataRequest:
    """How much data a run will draw, told to the dataset before it is built."""

    config: "ConfigContainer"
    """The resolved configuration of the run."""
    train_samples: int | None
    """Samples that training draws in all; None asks for exactly one pass over the data."""
    validation_samples: int | None
    """Samples that one evaluation draws of each set; None asks for whole validation sets."""
    test_samples: int | None
    """As `validation_samples`, for the test sets."""
    modules: frozenset[str] | None = None
    """The modules whose inputs this rank reads; None for all. A dataset need not load what only
    modules on other ranks read."""


class SizedDataset(Protocol):
    """A map-style dataset: torch's ``Dataset`` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


TOKENS = "tokens"
"""The name in `DataSplits.items` of what the run counts as tokens."""


@dataclass(kw_only=True)
class DataSplits:
    """The data of a run. Every rank builds the same splits; the loop cuts out each rank's share.

    Where ranks build splits of different sizes, the smallest size counts on all of them.
    """

    train: SizedDataset | None
    validation: SizedDataset | Mapping[str, SizedDataset] | None = None
    """One set, or several by name: their metrics are then ``validation/NAME/METRIC``."""
    test: SizedDataset | Mapping[str, SizedDataset] | None = None
    """As `validation`."""
    shuffle: bool = True
    """Draw the training samples in a new seeded order each epoch. False: in the dataset's order,
    for a dataset that has shuffled already."""
    collate: Callable[[Sequence[Any]], Any] | None = None
    """Makes a microbatch of a list of samples; torch's default_collate if None."""
    fingerprint: str | None = None
    """Names the order of the training samples, for a dataset that orders them itself: a resumed
    run must draw the same. None derives it from the length, `shuffle` and the seed."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts for the start-up lines, such as ``{"train tokens": 12_000_000}``."""
    warnings: list[str] = field(default_factory=list)
    """Lines that the user should read when the run starts."""
    items: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    """What a training microbatch holds, by name: counts it on the host. The run then reports
    ``NAME_per_s``, ``{"images": ...}`` its images a second. Without `TOKENS` among them, a sample
    has model.seq_length tokens, padding included; where the model has no such field, the tokens are
    those that the loss function counts. The same names on all ranks."""


def named_sets(
    split: str, data: SizedDataset | Mapping[str, SizedDataset] | None
) -> dict[str, SizedDataset]:
    """Return the sets of a split by the names under which results stand.

    That is ``{"validation": set}`` for one set, ``{"validation/NAME": set, ...}`` for several, and
    nothing where there is no set or it is empty.

    Args:
        split: "validation" or "test".
        data: What `DataSplits` has for it.

    Raises:
        UsageError: A name is empty or has a slash.
    """
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        return {split: data} if len(data) else {}
    for name in data:
        if problem := wrong_set_name(name):
            raise UsageError(f"{split} data: {problem}")
    return {f"{split}/{name}": dataset for name, dataset in data.items()}


def wrong_set_name(name: Any) -> str | None:
    """Say what is wrong with the name of a set; None if nothing is."""
    if isinstance(name, str) and name.strip() and "/" not in name:
        return None
    return f"the name {name!r} of a set must be text that is not empty and has no '/'; rename it"


@runtime_checkable
class DatasetConfig(Protocol):
    """Describes the data of a run and builds its splits."""

    def build(self, request: DataRequest) -> DataSplits | Sequence[SizedDataset | None]:
        """Build the splits: `DataSplits`, or a sequence of train, validation and test data."""
        ...


@dataclass(kw_only=True, frozen=True)
class DataShard:
    """The part of each global microbatch that a rank reads: consecutive samples.

    A global microbatch is one microbatch of every replica of the model. It is cut into `size`
    shards of equal length, of which the rank reads number `rank`.
    """

    rank: int
    size: int
    samples: int
    """Samples of the shard."""


type DataIterator = Iterator[Any]
