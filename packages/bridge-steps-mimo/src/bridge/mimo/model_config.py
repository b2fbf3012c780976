"""The multimodal model's section of a run's configuration, which also builds the model."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from bridge.mimo.assembly import assemble_model
from bridge.mimo.model import MultimodalModel
from bridge.mimo.ranks.picture import draw_placement
from bridge.mimo.ranks.placement import LANGUAGE, ModulePlacement, place_modules
from bridge.mimo.ranks.process_groups import open_process_groups
from bridge.mimo.ranks.separate_ranks import SeparateRanks
from bridge.mimo.sections import (
    LanguageModelConfig,
    ModuleParallelism,
    ModuleSection,
    ProjectionConfig,
    VisionEncoderConfig,
)
from bridge.training.config import ConfigContainer, Layout, Problem
from bridge.training.config.model_identity import model_field
from bridge.training.spelling import did_you_mean

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(kw_only=True)
class MultimodalModelConfig:
    """A language model, and encoders by name whose outputs are part of its input.

    The modules are "language" and the names of the encoders. An encoder has two parts,
    "NAME.encoder" and "NAME.projection".
    """

    language: LanguageModelConfig
    """The language model."""
    encoders: dict[str, VisionEncoderConfig]
    """The encoders, by the name of their modality."""
    projections: dict[str, ProjectionConfig] = field(default_factory=dict)
    """The projection of each encoder to the language model; linear where none is given."""
    special_token_ids: dict[str, int] = field(default_factory=dict)
    """The token at the positions of each modality's embeddings; the vocabulary need not have it."""
    # The optimizer of modules on separate ranks saves its state in another form.
    placement: Literal["colocated", "separate"] = model_field("training", default="colocated")
    """colocated: all modules on all ranks. separate: each on its own ranks."""
    parallelism: dict[str, ModuleParallelism] = model_field("execution", default_factory=dict)
    """The ranks of each module, and its layout over them."""
    freeze: list[str] = model_field("training", default_factory=list)
    """Modules or parts that are not trained, such as [vision.encoder, language]."""
    lr_multipliers: dict[str, float] = model_field("training", default_factory=dict)
    """Factors on optimizer.lr and optimizer.min_lr for modules or parts; that of a part replaces
    that of its module."""

    @property
    def seq_length(self) -> int:
        """Tokens of a sample."""
        return self.language.seq_length

    def sections(self) -> dict[str, ModuleSection]:
        """Return the section of each module by its path within this one."""
        encoders = {f"encoders.{name}": encoder for name, encoder in self.encoders.items()}
        return {"language": self.language, **encoders}

    def build(
        self,
        pg_collection: "ProcessGroupCollection",
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> MultimodalModel:
        """Build the model on the current device (see `contracts.ModelConfig.build`)."""
        if isinstance(pg_collection, SeparateRanks):
            groups = {pg_collection.name: pg_collection.groups}
            return self.build_modules(groups, pg_collection.grids)
        return self.build_modules(dict.fromkeys([LANGUAGE, *self.encoders], pg_collection))

    def build_modules(
        self,
        groups_by_module: "Mapping[str, ProcessGroupCollection]",
        grids: "Mapping[str, HyperCommGrid] | None" = None,
    ) -> MultimodalModel:
        """Build the modules of this rank, and freeze those that are not trained.

        Args:
            groups_by_module: See `assemble_model`.
            grids: See `assemble_model`.
        """
        model = assemble_model(
            self.language,
            self.encoders,
            self.projections,
            self.special_token_ids,
            groups_by_module,
            grids,
        )
        for name, parameter in model.named_parameters():
            if self.is_frozen(name):
                parameter.requires_grad_(False)
        return model

    def prefixes(self) -> dict[str, str]:
        """Return, by module and part, the prefix of its parameters' names in the model."""
        prefixes = {LANGUAGE: "language_model."}
        for name in self.encoders:
            prefixes[name] = f"modality_submodules.{name}."
            prefixes[f"{name}.encoder"] = f"modality_submodules.{name}.encoders."
            prefixes[f"{name}.projection"] = f"modality_submodules.{name}.input_projections."
        return prefixes

    def is_frozen(self, parameter: str) -> bool:
        """Whether the parameter of this name in the model is not trained."""
        return bool(self._with_parameter(parameter, self.freeze))

    def _with_parameter(self, parameter: str, names: Iterable[str]) -> list[str]:
        """Return the modules and parts, of those given, that have a parameter."""
        prefixes = self.prefixes()
        return [n for n in names if n in prefixes and parameter.startswith(prefixes[n])]

    # --- for the loop (bridge.training.contracts)

    def learning_rate_multiplier(self, parameter: str) -> float:
        """Return the factor on the learning rate of the parameter of this name in the model."""
        names = self._with_parameter(parameter, self.lr_multipliers)
        # The name of a part is longer than that of its module.
        return self.lr_multipliers[max(names, key=len)] if names else 1.0

    def open_fields(
        self, config: ConfigContainer, *, device: Literal["cuda", "cpu"]
    ) -> dict[str, Any]:
        """Return the value of each open field of the modules where it was left at its default."""
        return {
            f"{path}.{name}": value
            for path, section in self.sections().items()
            for name, value in section.device_defaults(device).items()
        }

    def derived_fields(self, config: ConfigContainer) -> Mapping[str, tuple[Any, str]]:
        """Return the parallel sizes of each module's section, derived from `parallelism`."""
        derived: dict[str, tuple[Any, str]] = {}
        for path in self.sections():
            module = path.rpartition(".")[2]
            given = self._parallelism_of(module)
            tensor = self.tensor_parallel_size(module)
            for name, size in (
                ("tensor_model_parallel_size", tensor),
                ("pipeline_model_parallel_size", given.pipeline_model_parallel_size),
            ):
                reason = f"model.parallelism.{module}.{name}={getattr(given, name)}"
                derived[f"{path}.{name}"] = (size, reason)
            if self.placement == "separate":
                # Stages send the shapes of their tensors ahead, as images differ in number.
                reason = "model.placement=separate"
                derived[f"{path}.variable_seq_lengths"] = (True, reason)
                derived[f"{path}.moe_token_dispatcher_type"] = ("alltoall", reason)
        return derived

    def tensor_parallel_size(self, module: str) -> int:
        """Return the number of ranks over which each layer of a module is sharded."""
        size = self._parallelism_of(module).tensor_model_parallel_size
        if size is not None:
            return size
        if self.placement == "separate" or module == LANGUAGE:
            return 1
        return self.tensor_parallel_size(LANGUAGE)

    def place_modules(self, world_size: int) -> tuple[dict[str, ModulePlacement], list[str]]:
        """Return the ranks of each module where they are separate, and the problems with them."""
        modules = {name: self._parallelism_of(name) for name in (*self.encoders, LANGUAGE)}
        return place_modules(modules, world_size)

    def _parallelism_of(self, module: str) -> ModuleParallelism:
        return self.parallelism.get(module, ModuleParallelism())

    def layout(self, world_size: int) -> Layout:
        """Return the layout of the language model, which colocated modules share.

        Args:
            world_size: Ranks of all modules.
        """
        tensor, pipeline = self.tensor_parallel_size(LANGUAGE), 1
        data = most = world_size // tensor
        if self.placement == "separate":
            placements, _ = self.place_modules(world_size)
            pipeline, data = placements[LANGUAGE].pipeline, placements[LANGUAGE].data
            most = max(placement.data for placement in placements.values())
        return Layout(
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=None,
            context=1,
            expert=1,
            expert_tensor=tensor,
            data=data,
            world_size=world_size,
            most_parts=most,
        )

    def layout_picture(self, world_size: int) -> str | None:
        """Return a picture of the modules on their ranks; None where all are on all ranks."""
        if self.placement == "colocated":
            return None
        placements, _ = self.place_modules(world_size)
        return draw_placement(placements, world_size) if placements else None

    def module_ranks(
        self, *, world_size: int, timeout: timedelta
    ) -> AbstractContextManager[SeparateRanks] | None:
        """Return a context with the modules' process groups, for modules on separate ranks."""
        if self.placement == "colocated":
            return None
        return open_process_groups(self.place_modules(world_size)[0], timeout)

    def layout_problems(self, world_size: int) -> Iterator[str]:
        """Yield the reasons why the modules do not fit on `world_size` ranks."""
        if self.placement == "separate":
            yield from self.place_modules(world_size)[1]
            yield from self._stage_problems()
            return
        tensor = self.tensor_parallel_size(LANGUAGE)
        if tensor < 1 or world_size % tensor:
            yield (
                f"model.parallelism.language.tensor_model_parallel_size={tensor}: does not divide "
                f"the {world_size} ranks; give a divisor"
            )
            return
        for module in (LANGUAGE, *self.encoders):
            yield from self._colocation_problems(module, tensor, world_size // tensor)

    def _stage_problems(self) -> Iterator[str]:
        for path, section in self.sections().items():
            stages = section.pipeline_model_parallel_size
            if stages > 1 and section.num_layers % stages:
                module = path.rpartition(".")[2]
                yield (
                    f"model.{path}.num_layers={section.num_layers}: is not a multiple of "
                    f"model.parallelism.{module}.pipeline_model_parallel_size={stages}; change one "
                    "of them"
                )

    def _colocation_problems(self, module: str, tensor: int, data: int) -> Iterator[str]:
        path = f"model.parallelism.{module}"
        given = self._parallelism_of(module)
        if self.tensor_parallel_size(module) != tensor:
            yield (
                f"{path}.tensor_model_parallel_size={given.tensor_model_parallel_size}: differs "
                f"from the language model's {tensor}, which colocated modules share; leave it out"
            )
        if given.data_parallel_size not in (None, data):
            yield (
                f"{path}.data_parallel_size={given.data_parallel_size}: colocated modules have "
                f"{data} replicas on these ranks; give that or leave it out"
            )
        if given.pipeline_model_parallel_size != 1:
            yield (
                f"{path}.pipeline_model_parallel_size={given.pipeline_model_parallel_size}: "
                "colocated modules have no pipeline; set 1"
            )
        if given.rank_offset not in (None, 0):
            yield (
                f"{path}.rank_offset={given.rank_offset}: colocated modules begin at rank 0; set 0"
            )

    def problems(self, config: ConfigContainer) -> Iterator[str | Problem]:
        """Yield contradictions within the section and within those of the modules."""
        for name in self.encoders:
            if name == LANGUAGE or not name.isidentifier():
                yield (
                    f"model.encoders.{name}: the name must be an identifier other than language; "
                    "rename it"
                )
        yield from self._names_problems()
        yield from self._token_problems()
        if self.placement == "separate" and config.mixed_precision.precision == "fp16":
            yield (
                "mixed_precision.precision=fp16: is not supported with model.placement=separate, "
                "where each module would scale its gradients in its own way; use bf16 or fp32"
            )
        if self.placement == "separate" and config.peft is not None:
            yield (
                "peft: adapters are not supported with model.placement=separate; set "
                "model.placement=colocated, or freeze whole modules with model.freeze"
            )
        for path, section in self.sections().items():
            yield from section.problems(f"model.{path}", config)
        for name, factor in self.lr_multipliers.items():
            if not (factor > 0 and math.isfinite(factor)):
                yield (
                    f"model.lr_multipliers.{name}={factor}: must be above 0; model.freeze=[{name}] "
                    "keeps weights as they are"
                )
        # A module with parts may be frozen part by part.
        leaves = [prefix for name, prefix in self.prefixes().items() if name not in self.encoders]
        if all(self.is_frozen(prefix) for prefix in leaves):
            yield "model.freeze: every module is frozen, so nothing would be trained; leave one out"

    def _names_problems(self) -> Iterator[str]:
        modules, parts = [LANGUAGE, *self.encoders], list(self.prefixes())
        for field_name, names, allowed in (
            ("projections", self.projections, list(self.encoders)),
            ("special_token_ids", self.special_token_ids, list(self.encoders)),
            ("parallelism", self.parallelism, modules),
            ("freeze", self.freeze, parts),
            ("lr_multipliers", self.lr_multipliers, parts),
        ):
            for name in names:
                if name not in allowed:
                    yield (
                        f"model.{field_name}: there is no {name!r}{did_you_mean(name, allowed)} "
                        f"(there are {', '.join(allowed)})"
                    )

    def _token_problems(self) -> Iterator[str]:
        for name in self.encoders:
            if name not in self.special_token_ids:
                yield (
                    f"model.special_token_ids: {name!r} has none; give the token at the "
                    f"positions of its embeddings, such as model.special_token_ids.{name}=-200"
                )
        tokens = list(self.special_token_ids.values())
        if len(set(tokens)) < len(tokens):
            yield (
                f"model.special_token_ids={self.special_token_ids}: two modalities have one token; "
                "give each its own token"
            )
