"""The contracts of a model section; all but ModelConfig are optional."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge.training.config import ConfigContainer, Layout, Problem


@runtime_checkable
class ModelConfig(Protocol):
    """A model section: it describes a model and builds one pipeline stage of it.

    A config that is also a megatron-core ``ModelParallelConfig`` has the parallel layout in its
    fields (``tensor_model_parallel_size`` and so on). Any other is trained data-parallel only.

    A field defines the model unless declared otherwise: neither a resumed run nor one that starts
    from its weights may change it. A field for how the model is trained or executed is declared
    with `bridge.training.config.model_field`, or has the name of one of megatron-core's.
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
            pg_collection: The process groups of this rank; those of `PlacesModules.module_ranks`
                where the section places its modules on ranks of their own.
            pre_process: Whether the chunk holds the input side (the embedding).
            post_process: Whether the chunk holds the output side (the logits and the loss).
            vp_stage: Index of the virtual pipeline stage, None without interleaving.
        """


@runtime_checkable
class LeavesFieldsOpen(Protocol):
    """A model section whose defaults depend on the run: on its device, or on other sections."""

    def open_fields(
        self, config: "ConfigContainer", *, device: Literal["cuda", "cpu"]
    ) -> dict[str, Any]:
        """Return the value of each such field, used where the field was left at its default."""


@runtime_checkable
class DerivesFields(Protocol):
    """A model section with fields that follow from others."""

    def derived_fields(self, config: "ConfigContainer") -> Mapping[str, tuple[Any, str]]:
        """Return, for each such field, its value and the reason, such as ``model.width=4``."""


@runtime_checkable
class ArrangesRanks(Protocol):
    """A model section that arranges the ranks of a run itself.

    It is for a model of several modules; a ``ModelParallelConfig`` has its sizes in its fields.
    """

    def layout(self, world_size: int) -> "Layout":
        """Return the layout on `world_size` ranks, for which `layout_problems` yields nothing."""

    def layout_problems(self, world_size: int) -> "Iterable[str | Problem]":
        """Yield one line for each reason why the modules do not fit on `world_size` ranks.

        A line has the form of those of `ChecksItself`. The last may be followed by further lines
        that draw the ranks.
        """


@runtime_checkable
class DrawsLayout(Protocol):
    """A model section that draws a picture of its layout."""

    def layout_picture(self, world_size: int) -> str | None:
        """Return the lines of a picture of the ranks; None if the sizes are enough."""


@runtime_checkable
class ScalesLearningRates(Protocol):
    """A model section with learning rates of its own for some parameters."""

    def learning_rate_multiplier(self, parameter: str) -> float:
        """Return the factor on optimizer.lr and optimizer.min_lr for a parameter of the model.

        Args:
            parameter: Its name within the module that `ModelConfig.build` returned.
        """


@runtime_checkable
class ChecksItself(Protocol):
    """A section of the user's own that looks for contradictions before anything is built."""

    def problems(self, config: "ConfigContainer") -> "Iterable[str | Problem]":
        """Yield one line for each problem, ``section.field=value: why; what to do``.

        A line is not reported if it names a field whose value was rejected before. A
        `Problem` says itself which fields it is about. The check must build nothing.
        """
