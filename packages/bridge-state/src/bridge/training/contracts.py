"""What a run asks of the pieces that it does not own: a model, its data, a recipe.

The loop knows no model family. Whatever satisfies these Protocols can be trained, so one's own
module, dataset and forward step make a run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge.training.config import ConfigContainer, Layout


@runtime_checkable
class ModelConfig(Protocol):
    """Describes a model and builds the part of it that belongs to one pipeline stage.

    A config that is also a megatron-core ``ModelParallelConfig`` brings the parallel layout
    (``tensor_model_parallel_size`` and so on); any other is trained data-parallel only.
    """

    def build(
        self,
        pg_collection: "ProcessGroupCollection",
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> torch.nn.Module:
        """Build one model chunk on the current device.

        Args:
            pg_collection: The process groups of this rank.
            pre_process: Whether the chunk holds the input side (the embedding).
            post_process: Whether the chunk holds the output side (the logits and the loss).
            vp_stage: Index of the virtual pipeline stage, None without interleaving.
        """
        ...


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


class SizedDataset(Protocol):
    """A map-style dataset: torch's ``Dataset`` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


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
        ValueError: A name is empty or has a slash.
    """
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        return {split: data} if len(data) else {}
    for name in data:
        if problem := wrong_set_name(name):
            raise ValueError(f"{split} data: {problem}")
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


@runtime_checkable
class LeavesFieldsOpen(Protocol):
    """A model section whose defaults depend on the run: on its device, or on other sections."""

    def open_fields(
        self, config: "ConfigContainer", *, device: Literal["cuda", "cpu"]
    ) -> dict[str, Any]:
        """Return the value of each such field, used where the field was left at its default."""
        ...


@runtime_checkable
class DerivesFields(Protocol):
    """A model section with fields that follow from others, and must not contradict them."""

    def derived_fields(self, config: "ConfigContainer") -> Mapping[str, tuple[Any, str]]:
        """Return, for each such field, its value and the reason, such as ``model.width=4``."""
        ...


@runtime_checkable
class ArrangesRanks(Protocol):
    """A model section that says itself how the ranks of a run are arranged.

    It is for a model of several modules; a ``ModelParallelConfig`` has its sizes in its fields.
    """

    def layout(self, world_size: int) -> "Layout":
        """Return the layout on `world_size` ranks, which `layout_problems` has nothing against."""
        ...

    def layout_problems(self, world_size: int) -> Iterable[str]:
        """Yield one line for each reason why the modules do not fit on `world_size` ranks."""
        ...


@runtime_checkable
class ScalesLearningRates(Protocol):
    """A model section whose parameters do not all learn at optimizer.lr."""

    def learning_rate_multiplier(self, parameter: str) -> float:
        """Return the factor on optimizer.lr and optimizer.min_lr for a parameter of the model.

        Args:
            parameter: Its name within the module that `ModelConfig.build` returned.
        """
        ...


@runtime_checkable
class ChecksItself(Protocol):
    """A section of one's own may look for contradictions before anything is built."""

    def problems(self, config: "ConfigContainer") -> Iterable[str]:
        """Yield one line for each problem: field, value and remedy. It must build nothing."""
        ...


@dataclass(kw_only=True, frozen=True)
class Recipe:
    """A named run: calling it gives a fresh configuration, beside it the step that goes with it."""

    name: str
    summary: str
    """One line for ``bridge recipes``."""
    make_config: Callable[[], "ConfigContainer"]
    forward_step: Callable[..., Any]
    callbacks: Callable[[], Sequence[Any]] = tuple
    """Makes the callbacks that the command adds (what a recipe prints at its end, say)."""

    def __call__(self) -> "ConfigContainer":
        """Return a fresh, unshared configuration."""
        config = self.make_config()
        config.recipe = self.name
        return config


type DataIterator = Iterator[Any]
