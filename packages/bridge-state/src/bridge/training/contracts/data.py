"""The data of a run: the interface of a dataset section, and the data that it builds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


@dataclass(kw_only=True, frozen=True)
class DataRequest:
    """The amount of data that a run draws; the argument of a dataset section's ``build``."""

    config: "ConfigContainer"
    """The resolved configuration of the run."""
    train_samples: int | None
    """Samples that training draws in total; None for exactly one pass over the data."""
    validation_samples: int | None
    """Samples that one evaluation draws of each set; None for all of them."""
    test_samples: int | None
    """As `validation_samples`, for the test sets."""
    modules: frozenset[str] | None = None
    """The modules whose inputs this rank reads; None for all. A dataset need not load inputs that
    only modules on other ranks read."""


class SizedDataset(Protocol):
    """A map-style dataset: torch's ``Dataset`` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


TOKENS = "tokens"
"""The name in `DataSplits.items` of what the run counts as tokens."""


@dataclass(kw_only=True)
class DataSplits:
    """The data of a run. Every rank builds the same splits, and the loop gives each its shard.

    Where ranks build splits of different sizes, all use the smallest.
    """

    train: SizedDataset | None
    validation: SizedDataset | Mapping[str, SizedDataset] | None = None
    """One set, or several by name: their metrics are then ``validation/NAME/METRIC``."""
    test: SizedDataset | Mapping[str, SizedDataset] | None = None
    """As `validation`."""
    shuffle: bool = True
    """Whether to draw the training samples in a new seeded order each epoch; False for a dataset
    that is shuffled already."""
    collate: Callable[[Sequence[Any]], Any] | None = None
    """Makes a microbatch of a list of samples; torch's default_collate if None."""
    fingerprint: str | None = None
    """The name of the order of the training samples, for a dataset that orders them itself: a
    resumed run must draw the same. None derives it from the length, `shuffle` and the seed."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts for the startup messages, such as ``{"train tokens": 12_000_000}``."""
    warnings: list[str] = field(default_factory=list)
    """Warnings at the start of the run, one line each."""
    items: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    """Counters of a training microbatch's contents on the host, by name, the same on all ranks. The
    run reports ``NAME_per_s``: with ``{"images": ...}`` its images per second. Without `TOKENS`
    among them, a sample has model.seq_length tokens, padding included. Where the model has no such
    field, the tokens are those that the loss function counts."""


def named_sets(
    split: str, data: SizedDataset | Mapping[str, SizedDataset] | None
) -> dict[str, SizedDataset]:
    """Return the sets of a split by the names of their results.

    They are ``{"validation": set}`` for one set, ``{"validation/NAME": set, ...}`` for several, and
    none where there is no set or it is empty.

    Args:
        split: "validation" or "test".
        data: The field of `DataSplits`.

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
    """Return the problem of a set's name; None if it has none."""
    if isinstance(name, str) and name.strip() and "/" not in name:
        return None
    return f"the name {name!r} of a set must be text that is not empty and has no '/'; rename it"


@runtime_checkable
class DatasetConfig(Protocol):
    """A dataset section, which builds the data of a run."""

    def build(self, request: DataRequest) -> DataSplits | Sequence[SizedDataset | None]:
        """Build the splits: `DataSplits`, or a sequence of train, validation and test data."""


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
