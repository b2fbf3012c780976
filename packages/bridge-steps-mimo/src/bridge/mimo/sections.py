"""The sections of the modules in a multimodal model's configuration."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, override

from bridge.mimo.projections import LinearProjection, MLPProjection
from bridge.mimo.vision import VisionTransformer
from bridge.training.config import ConfigContainer, Problem
from bridge.training.config.model_identity import model_field
from bridge.training.megatron_import import quiet_import
from bridge.training.transformer.language_model_section import LanguageModelSection
from bridge.training.transformer.section import TransformerSection

with quiet_import():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(kw_only=True)
class ModuleParallelism:
    """The ranks of a module, and its layout over them."""

    tensor_model_parallel_size: int | None = None
    """Ranks over which each layer is sharded. None: the language model's where the modules are
    colocated, else 1."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages, each with some of the layers."""
    data_parallel_size: int | None = None
    """Data-parallel replicas of the module. None: as many as there are ranks for, the same for all
    modules that leave it open."""
    rank_offset: int | None = None
    """The first of the module's ranks, for modules on separate ranks. None: after those of the
    module before it; encoders come first, the language model last."""


@dataclass(kw_only=True)
class ModuleSection(TransformerSection):
    """The base of the sections of all transformers in a multimodal model.

    Its parallel sizes are derived from ``model.parallelism``.
    """

    def problems(self, path: str, config: ConfigContainer) -> Iterator[str | Problem]:
        """Yield contradictions, and settings that a multimodal model does not support.

        Args:
            path: Path of the section.
            config: The run's configuration.
        """
        yield from self.feature_problems(path, config)
        if self.use_mup:
            yield (
                f"{path}.use_mup=true: is not supported by multimodal models, whose learning rates "
                "model.lr_multipliers scales; leave it out"
            )
        for name in ("num_moe_experts", "mtp_num_layers", "virtual_pipeline_model_parallel_size"):
            if (value := getattr(self, name)) is not None:
                yield f"{path}.{name}={value}: is not supported by multimodal models; set null"
        if self.context_parallel_size != 1:
            yield (
                f"{path}.context_parallel_size={self.context_parallel_size}: context parallelism "
                "is not supported by multimodal models; set 1"
            )


@dataclass(kw_only=True)
class LanguageModelConfig(ModuleSection, LanguageModelSection):
    """The language model: megatron-core's GPT.

    Learned positions are for text: images have those of their encoder.
    """

    vocab_size: int = field()
    """Number of tokens."""
    seq_length: int = model_field("extensible", default=1024)
    """Tokens of a sample, including those of images; also the number of learned positions."""

    def build_spec(self, pg_collection: "ProcessGroupCollection") -> ModuleSpec:
        """Return the specification of the stage that is on a rank.

        Args:
            pg_collection: The process groups of the language model.
        """
        self.reject_open_layer_spec("model.language")
        config = self.finalized()
        stage, stages = pg_collection.pp.rank(), pg_collection.pp.size()
        arguments = self.gpt_arguments(
            config, pg_collection, pre_process=stage == 0, post_process=stage == stages - 1
        )
        # The sequence is split later, when the images are in it.
        arguments["scatter_embedding_sequence_parallel"] = False
        return ModuleSpec(module=GPTModel, params=arguments)

    @override
    def problems(self, path: str, config: ConfigContainer) -> Iterator[str | Problem]:
        """Yield as `ModuleSection.problems`, and mistakes in vocabulary and sequence."""
        yield from super().problems(path, config)
        yield from self.language_model_problems(path)
        for name in ("vocab_size", "seq_length"):
            if getattr(self, name) < 1:
                yield f"{path}.{name}={getattr(self, name)}: must be at least 1; raise it"
        if self.sequence_parallel and self.seq_length % self.tensor_model_parallel_size:
            yield (
                f"{path}.seq_length={self.seq_length}: is not a multiple of the tensor-parallel "
                f"size {self.tensor_model_parallel_size}, which {path}.sequence_parallel needs; "
                "change it"
            )


@dataclass(kw_only=True)
class VisionEncoderConfig(ModuleSection):
    """An encoder of images: a vision transformer."""

    image_size: int = 224
    """Height and width of the images, in pixels."""
    patch_size: int = 16
    """Height and width of a patch, in pixels: an image becomes (image_size / patch_size)**2
    tokens."""
    num_channels: int = 3
    """Channels of the images."""

    @property
    def tokens_per_image(self) -> int:
        """Embeddings of an image, and special tokens for it."""
        return (self.image_size // self.patch_size) ** 2

    def build_spec(self, path: str, pg_collection: "ProcessGroupCollection") -> ModuleSpec:
        """Return the specification of the encoder.

        Args:
            path: Path of the section.
            pg_collection: The process groups of its modality.
        """
        self.reject_open_layer_spec(path)
        return ModuleSpec(
            module=VisionTransformer,
            params={
                "config": self.finalized(),
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "num_channels": self.num_channels,
                "pg_collection": pg_collection,
            },
        )

    @override
    def problems(self, path: str, config: ConfigContainer) -> Iterator[str | Problem]:
        """Yield as `ModuleSection.problems`, and mistakes in the sizes of the images."""
        yield from super().problems(path, config)
        sizes = ("image_size", "patch_size", "num_channels")
        wrong = [name for name in sizes if getattr(self, name) < 1]
        for name in wrong:
            yield f"{path}.{name}={getattr(self, name)}: must be at least 1; raise it"
        if not wrong and self.image_size % self.patch_size:
            yield (
                f"{path}.image_size={self.image_size}: is not a multiple of "
                f"{path}.patch_size={self.patch_size}; change one of them"
            )
        if self.sequence_parallel:
            yield (
                f"{path}.sequence_parallel=true: is not supported by encoders; set false "
                "(model.language.sequence_parallel may be true)"
            )


@dataclass(kw_only=True)
class ProjectionConfig:
    """A projection from an encoder's width to that of the language model."""

    kind: Literal["linear", "mlp"] = "linear"
    """linear: one matrix. mlp: two with a GELU between them, of the language model's width."""

    def build_spec(
        self,
        language: TransformerConfig,
        *,
        input_size: int,
        pg_collection: "ProcessGroupCollection",
    ) -> ModuleSpec:
        """Return the specification of the projection.

        Args:
            language: The finalized language model.
            input_size: Width of the encoder.
            pg_collection: The process groups of its modality.
        """
        return ModuleSpec(
            module=LinearProjection if self.kind == "linear" else MLPProjection,
            params={"config": language, "input_size": input_size, "pg_collection": pg_collection},
        )
