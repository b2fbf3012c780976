"""What a run asks of the pieces that it does not own: a model, its data, a recipe.

The loop knows no model family. Whatever satisfies these Protocols can be trained, so one's own
module, dataset and forward step make a run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

from bridge.training.usage_error import UsageError

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
            pg_collection: The process groups of this rank; what `PlacesModules.module_ranks` gave
                where the section places its modules on ranks of their own.
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
        """Yield one line for each reason why the modules do not fit on `world_size` ranks.

        Further lines of the last may draw how they would lie.
        """
        ...


@runtime_checkable
class DrawsLayout(Protocol):
    """A model section that has more to show of its layout than sizes."""

    def layout_picture(self, world_size: int) -> str | None:
        """Return a picture of text, lines that say which rank is what; None if sizes say it all."""
        ...


@dataclass(kw_only=True, frozen=True)
class DataShare:
    """Which part of each global microbatch a rank reads: consecutive samples.

    A global microbatch is what all copies of the model take at once, a microbatch each. It is cut
    into `size` parts of equal length, of which the rank reads number `rank`.
    """

    rank: int
    size: int
    samples: int
    """Samples of the part."""


@runtime_checkable
class ModuleRanks(Protocol):
    """What the loop asks about a rank of a run whose modules are on ranks of their own.

    It stands wherever the loop takes process groups, as megatron-core's
    MultiModuleProcessGroupCollection, which it extends. Each rank holds one module.
    """

    own: "ProcessGroupCollection"
    """The groups of the module on this rank."""
    replicas: int
    """Copies of the whole model: what train.global_batch_size is divided over."""
    stage: int
    """This rank's place in the pipeline that the modules form, from 0 on."""
    is_last_stage: bool
    """Whether losses are known here."""
    reads_inputs_of: frozenset[str]
    """The module on this rank, if it begins here."""

    def share(self, micro_batch_size: int) -> DataShare:
        """Return what this rank reads of the samples."""
        ...

    @property
    def smallest_microbatch(self) -> int:
        """Samples of which a microbatch holds a multiple, so that every module gets whole ones."""
        ...

    def communicator(self, model_config: Any) -> Any:
        """Return what sends tensors between the stages, the same object at every call."""
        ...

    def total(self, number: "torch.Tensor") -> None:
        """Make a number that the last stages have the sum over all of them, on every rank."""
        ...

    def gradient_factor(self, *, summed: bool) -> float:
        """Return what this rank's gradients are to be multiplied by, once they are reduced.

        Args:
            summed: Whether they are the sum over data-parallel ranks; else the mean.
        """
        ...

    def optimizer(self, own: Any, optimizer_config: Any) -> Any:
        """Return the optimizer of all modules' weights.

        Args:
            own: The optimizer of this rank's weights; None where none is trained.
            optimizer_config: megatron-core's.
        """
        ...


@runtime_checkable
class PlacesModules(Protocol):
    """A model section whose modules may be on ranks of their own."""

    def module_ranks(
        self, *, world_size: int, timeout: timedelta
    ) -> "AbstractContextManager[ModuleRanks] | None":
        """Return what brings up the process groups, and takes them down; a collective.

        None where all modules are on all ranks, in megatron-core's own groups.

        Args:
            world_size: Ranks of the run.
            timeout: How long a collective may take.
        """
        ...


@runtime_checkable
class HoldsOneModule(Protocol):
    """A model of which this rank holds one module, which is trained for itself."""

    def own_module(self) -> "tuple[torch.nn.Module, Any]":
        """Return the module, and its megatron-core TransformerConfig."""
        ...

    def replace_own_module(self, wrapped: "torch.nn.Module") -> None:
        """Put the module, wrapped for training, in its place."""
        ...


def own_groups(groups: "ProcessGroupCollection | ModuleRanks") -> "ProcessGroupCollection":
    """Return the process groups of what a rank holds of the model."""
    return groups.own if isinstance(groups, ModuleRanks) else groups


def replicas_of(groups: "ProcessGroupCollection | ModuleRanks") -> int:
    """Return the number of copies of the model that a global batch is divided over."""
    return groups.replicas if isinstance(groups, ModuleRanks) else int(groups.dp.size())


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


class LowRankUpdate(Protocol):
    """What a method of parameter-efficient fine-tuning does to some rows of a weight W.

    The rows become W + scale * B A; with `magnitude`, each of those is then brought to the length
    that it says.
    """

    @property
    def rows(self) -> torch.Tensor | None:
        """The indices of the rows, in the order of B's; None for all rows in theirs."""

    @property
    def a(self) -> torch.Tensor:
        """[rank, columns of W]."""

    @property
    def b(self) -> torch.Tensor:
        """[rows, rank]."""

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""

    @property
    def magnitude(self) -> torch.Tensor | None:
        """[rows]."""


class AdaptedLayer(Protocol):
    """A layer beside which a method of parameter-efficient fine-tuning has put what it trains."""

    @property
    def name(self) -> str:
        """In the whole model, the same under every parallel layout."""

    def low_rank_updates(self) -> Sequence[LowRankUpdate]:
        """Return what the layer's weight is changed by, as far as this rank holds it."""
        ...


@runtime_checkable
class PEFTMethod(Protocol):
    """Trains few parameters beside a frozen model: the section ``peft`` of a run.

    The loop loads the model's weights, lets the method attach, wraps the result in DDP, and loads
    the state of what was attached. It trains and saves what requires gradients then. A new
    parameter may name in ``initializer`` a function that fills a tensor of its full shape: with
    rng.layout_invariant_init it is drawn so, as the model's own weights are. The modules that were
    attached tell their place in the whole model by ``sharded_state_dict``, as megatron-core's do.

    Installed packages offer their methods, dataclasses with their fields, by the entry points of
    the group ``bridge.peft``; `method` is the name there.
    """

    @property
    def method(self) -> str:
        """The method's name, a field of the dataclass."""

    def attach(
        self, model_chunks: Sequence[torch.nn.Module], group: Any = None
    ) -> "Sequence[AdaptedLayer]":
        """Freeze the model and put the parameters that train beside its layers.

        Args:
            model_chunks: This rank's part of the model with its weights, wrapped for 16 bits or
                not.
            group: The process group of all ranks, for what they must agree on.

        Raises:
            UsageError: The fields do not fit the model.
        """
        ...

    def merge(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """Fold what was trained into the model's own weights, and leave a plain model."""
        ...


@dataclass(kw_only=True, frozen=True)
class ExportedWeight:
    """How one weight of a model stands in another format: whole, or its rows in several tensors."""

    shape: tuple[int, ...]
    """The weight's shape over all ranks, without rows that pad it."""
    parts: Mapping[str, torch.Tensor | None]
    """For each name there, the indices of the rows that it holds, in its order; None for all."""

    def split(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of the other format by name.

        Args:
            weight: The weight, or whatever has its rows, such as the output side of an adapter:
                ``[rows, ...]``, rows that pad it at the end are left out.
        """
        weight = weight[: self.shape[0]]
        return {name: weight if rows is None else weight[rows] for name, rows in self.parts.items()}

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight that `split` would take apart into these tensors."""
        whole: torch.Tensor | None = None
        for name, rows in self.parts.items():
            part = tensors[name]
            if rows is None:
                return part
            if whole is None:
                whole = part.new_empty((self.shape[0], *part.shape[1:]))
            whole[rows] = part
        assert whole is not None
        return whole

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor of this name in the other format."""
        rows = self.parts[name]
        return self.shape if rows is None else (len(rows), *self.shape[1:])


@runtime_checkable
class NamesWeights(Protocol):
    """A model section that knows how its weights stand in the format in which others share them."""

    def exported_weights(self) -> Mapping[str, ExportedWeight]:
        """Return every weight of the model by its name here, in the order of the layers.

        The name is that of a checkpoint's tensor with the layer's number in it, counted over all
        pipeline stages: ``decoder.layers.3.self_attention.linear_qkv.weight``. The norm before a
        linear layer is named as Transformer Engine's fused layer has it: ``linear_qkv`` has
        ``layer_norm_weight``.

        Raises:
            UsageError: The format has no place for such a model; the message names the fields.
        """
        ...


@dataclass(kw_only=True, frozen=True)
class ExportRequest:
    """What ``bridge export`` asks of the package that knows the target."""

    checkpoint: Path
    """The folder of the checkpoint."""
    config: "ConfigContainer"
    """The configuration that was saved with it."""
    output: Path
    """An empty folder. It gets its final name only after the exporter has returned."""
    dtype: torch.dtype | None
    """Type of the floating point numbers; None keeps that of the checkpoint."""
    max_shard_size: int
    """Bytes that one file may hold; a larger tensor has a file for itself."""


type Exporter = Callable[[ExportRequest], str]
"""Writes a checkpoint in another format and returns a line that says what was written. The entry
points of the group ``bridge.exporters`` are such functions, by the target's name."""


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
