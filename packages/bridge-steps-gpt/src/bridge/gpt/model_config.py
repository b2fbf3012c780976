"""The GPT model's section of a run's configuration, which also builds the model."""

import contextlib
import copy
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.gpt.data.tokenizers import vocab_size
    from bridge.gpt.layer_specs import decoder_block_spec, has_transformer_engine, mtp_block_spec
    from bridge.gpt.model import GPT
    from bridge.training.config import ConfigContainer

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

_AUTOMATIC = (
    "gradient_accumulation_fusion",
    "cross_entropy_loss_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "deallocate_pipeline_outputs",
)


@dataclass(kw_only=True)
class GPTModelConfig(TransformerConfig):
    """A GPT model: megatron-core's transformer with vocabulary, positions and a choice of modules.

    The values stay what the user wrote: megatron-core's own derivations run on the copy that
    `finalized` returns. Fields that stay open until the run is known (None, or auto) take the
    values of `open_fields`.
    """

    vocab_size: int | None = None
    """Number of tokens; the tokenizer's if None."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, the same under every parallel layout
    (unless tensor_model_parallel_size does not divide it)."""
    seq_length: int = 1024
    """Tokens of a sample; also the number of learned positions."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """How the model knows positions."""
    rotary_base: int = 10000
    """Base period of the rotary embedding."""
    rotary_percent: float = 1.0
    """Part of each head's channels that is rotated."""
    rope_scaling: bool = False
    """Stretch the rotary embedding's long wavelengths as Llama 3.1 does."""
    rope_scaling_factor: float = 8.0
    """By how much rope_scaling stretches."""
    share_embeddings_and_output_weights: bool = False
    """Use the token embedding as the output layer's weight."""
    layer_spec: Literal["auto", "transformer_engine", "local"] = "auto"
    """auto takes Transformer Engine's modules on a GPU where it is installed, else the local ones.
    It takes the place of transformer_impl."""

    # megatron-core's switches whose best value depends on device and libraries.
    gradient_accumulation_fusion: bool | None = None  # type: ignore[assignment]
    """Add weight gradients to the gradient buffer inside the matrix product. None: where Apex's
    extension or Transformer Engine does it."""
    cross_entropy_loss_fusion: bool | None = None  # type: ignore[assignment]
    """Compute the loss in fused kernels. None: on a GPU."""
    bias_activation_fusion: bool | None = None  # type: ignore[assignment]
    """Fuse bias and activation. None: on a GPU, for the activations that have such a kernel."""
    bias_dropout_fusion: bool | None = None  # type: ignore[assignment]
    """Fuse bias, dropout and residual. None: on a GPU."""
    apply_rope_fusion: bool | None = None  # type: ignore[assignment]
    """Rotate in a fused kernel. None: with Transformer Engine."""
    moe_grouped_gemm: bool | None = None  # type: ignore[assignment]
    """Compute all local experts in one grouped product. None: with Transformer Engine."""
    moe_permute_fusion: bool | None = None  # type: ignore[assignment]
    """Permute tokens for the experts in fused kernels. None: with Transformer Engine."""
    deallocate_pipeline_outputs: bool | None = None  # type: ignore[assignment]
    """Free a pipeline stage's output once it was sent. None: under pipeline parallelism."""

    cuda_graph_modules: list[str] = field(default_factory=list)
    """What per-layer CUDA graphs capture; empty for whole layers (megatron-core's own default
    says the same in a deprecated word)."""

    def __post_init__(self) -> None:
        """Derive nothing yet: see `finalized`."""

    def __getstate__(self) -> dict[str, Any]:
        # The shared copy holds the hooks of a running model; it stays with this object.
        return {name: value for name, value in vars(self).items() if name != "_shared"}

    def open_fields(
        self, config: ConfigContainer, *, device: Literal["cuda", "cpu"]
    ) -> dict[str, Any]:
        """Return the value that each field takes where it was left at its default.

        `bridge.training.config.resolve` asks for it, so that the values stand in the resolved
        configuration; nothing is changed here. ``vocab_size`` is left out while it is unknown.

        Args:
            config: The run's configuration, of which this is the model section.
            device: Where the run will take place.
        """
        gpu = device == "cuda"
        layer_spec = self.layer_spec
        if layer_spec == "auto":
            layer_spec = "transformer_engine" if gpu and has_transformer_engine() else "local"
        engine = gpu and layer_spec == "transformer_engine"
        moe = self.num_moe_experts is not None
        values: dict[str, Any] = {
            "layer_spec": layer_spec,
            # A layer that is used twice in a pass would overwrite its own first gradient.
            "gradient_accumulation_fusion": (
                gpu and (engine or _grad_accum_fusion_available) and not self.mtp_use_repeated_layer
            ),
            "cross_entropy_loss_fusion": gpu,
            "bias_activation_fusion": gpu and self._has_fused_activation(),
            "bias_dropout_fusion": gpu,
            "apply_rope_fusion": engine and self.position_embedding_type == "rope",
            "moe_grouped_gemm": engine and moe,
            "moe_permute_fusion": engine and moe,
            "deallocate_pipeline_outputs": self.pipeline_model_parallel_size > 1,
        }
        if config.tokenizer is not None:
            with contextlib.suppress(ValueError):  # `problems` says what is wrong with it
                values["vocab_size"] = vocab_size(config.tokenizer)
        return values

    def finalized(self) -> TransformerConfig:
        """Return a fresh megatron-core config on which its own derivations and checks have run.

        Raises:
            ValueError, AssertionError: megatron-core found the values contradictory.
        """
        values = {
            known.name: _unshared(getattr(self, known.name)) for known in fields(TransformerConfig)
        }
        for name in _AUTOMATIC:
            values[name] = bool(values[name])
        values["transformer_impl"] = self.layer_spec
        # megatron-core's own layers (the output layer is one) have only Apex's extension.
        values["gradient_accumulation_fusion"] &= _grad_accum_fusion_available
        return TransformerConfig(**values)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size and the padding."""
        if self.vocab_size is None:
            raise ValueError(
                "model.vocab_size: None; give it, or a tokenizer section for it to be taken from"
            )
        multiple = math.lcm(self.make_vocab_size_divisible_by, self.tensor_model_parallel_size)
        return math.ceil(self.vocab_size / multiple) * multiple

    def build(
        self,
        pg_collection: "ProcessGroupCollection",
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> GPT:
        """Build one model chunk on the current device (see `contracts.ModelConfig.build`).

        Raises:
            ValueError: ``vocab_size`` or ``layer_spec`` is still open.
        """
        if self.layer_spec == "auto":
            raise ValueError(
                "model.layer_spec: 'auto' is not decided yet; pass the configuration through "
                "bridge.training.config.resolve, or give 'transformer_engine' or 'local'"
            )
        config = self._chunks_config(vp_stage)
        pp_rank = pg_collection.pp.rank()
        # megatron-core takes block specs too, which its annotations leave out.
        decoder: Any = decoder_block_spec(config, vp_stage=vp_stage, pp_rank=pp_rank)
        mtp: Any = mtp_block_spec(config, vp_stage=vp_stage, pp_rank=pp_rank)
        with _deprecation_held_back():
            model = GPT(
                config=config,
                transformer_layer_spec=decoder,
                vocab_size=self.padded_vocab_size,
                max_sequence_length=self.seq_length,
                pre_process=pre_process,
                post_process=post_process,
                parallel_output=True,
                share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                position_embedding_type=self.position_embedding_type,
                rotary_percent=self.rotary_percent,
                rotary_base=self.rotary_base,
                rope_scaling=self.rope_scaling,
                rope_scaling_factor=self.rope_scaling_factor,
                mtp_block_spec=mtp,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )
        if self.gradient_accumulation_fusion and self.layer_spec == "transformer_engine":
            _let_transformer_engine_accumulate(model)
        return model

    def training_flops_per_token(self) -> float:
        """Return the FLOPs of forward and backward for one token, without recomputation.

        6 for each weight that a token is multiplied with (its experts, the output layer, not the
        embedding), and 6 s d a layer for the causal half of the attention matrices, with s
        positions and d the heads times their width (PaLM, arXiv:2204.02311, appendix B).
        """
        heads, groups = self.num_attention_heads, self.num_query_groups or self.num_attention_heads
        width = self.kv_channels or self.hidden_size // heads
        attention = (
            self.hidden_size * width * 2 * (heads + groups) + self.seq_length * heads * width
        )
        layers = [attention + self._mlp_weights(is_moe) for is_moe in self._moe_pattern()]
        logits = self.hidden_size * self.padded_vocab_size
        one_more_token = 2 * self.hidden_size**2 + layers[-1] + logits
        return 6.0 * (sum(layers) + logits + (self.mtp_num_layers or 0) * one_more_token)

    def problems(self, config: ConfigContainer) -> Iterable[str]:
        """Yield what megatron-core would refuse only while it builds, or would not notice."""
        yield from self._vocabulary_problems(config)
        yield from self._feature_problems()

    def _vocabulary_problems(self, config: ConfigContainer) -> Iterator[str]:
        if self.make_vocab_size_divisible_by < 1:
            yield (
                f"model.make_vocab_size_divisible_by: {self.make_vocab_size_divisible_by}; give a "
                "number of at least 1"
            )
        if config.tokenizer is None:
            if self.vocab_size is None:
                yield (
                    "model.vocab_size: None, and there is no tokenizer to take it from; give "
                    "model.vocab_size or a tokenizer section"
                )
            return
        try:
            tokens = vocab_size(config.tokenizer)
        except ValueError as error:
            yield str(error)
            return
        if self.vocab_size is not None and tokens > self.vocab_size:
            yield (
                f"model.vocab_size: {self.vocab_size} is smaller than the tokenizer's {tokens} "
                "tokens; raise it or leave it out"
            )

    def _feature_problems(self) -> Iterator[str]:
        if self.transformer_impl != "transformer_engine":
            yield (
                f"model.transformer_impl: {self.transformer_impl!r}; the GPT model chooses its "
                "modules by model.layer_spec (auto, transformer_engine or local), set that"
            )
        if self.multi_latent_attention:
            yield "model.multi_latent_attention: True is not supported by the GPT model; set False"
        if self.experimental_attention_variant is not None:
            yield (
                f"model.experimental_attention_variant: {self.experimental_attention_variant!r} is "
                "not supported by the GPT model; leave it out"
            )
        if self.heterogeneous_block_specs:
            yield "model.heterogeneous_block_specs: True is not supported; set False"
        if self.mtp_num_layers and self.position_embedding_type == "learned_absolute":
            yield (
                "model.mtp_num_layers: multi-token prediction needs "
                "model.position_embedding_type=rope or none, not learned_absolute"
            )
        if self.layer_spec == "transformer_engine" and not has_transformer_engine():
            yield (
                "model.layer_spec: 'transformer_engine' was asked for and megatron-core found no "
                "Transformer Engine; use auto or local, or see `bridge doctor`"
            )
        if self.layer_spec == "local":
            for name in ("fp8", "fp4", "use_te_activation_func", "apply_rope_fusion"):
                if getattr(self, name):
                    yield (
                        f"model.{name}: {getattr(self, name)!r} needs Transformer Engine, and "
                        "model.layer_spec is local (auto chooses it where there is no GPU or no "
                        "Transformer Engine); leave it out"
                    )
            if self.gradient_accumulation_fusion and not _grad_accum_fusion_available:
                yield (
                    "model.gradient_accumulation_fusion: true needs Transformer Engine or Apex's "
                    "extension fused_weight_gradient_mlp_cuda, and neither serves this run; leave "
                    "it out"
                )

    def _has_fused_activation(self) -> bool:
        # The combinations that megatron-core's MLP has a fused kernel for.
        if self.activation_func is functional.gelu:
            return self.gated_linear_unit or self.add_bias_linear
        return self.activation_func is functional.silu and self.gated_linear_unit

    def _chunks_config(self, vp_stage: int | None) -> TransformerConfig:
        """Return one config for all chunks of a rank: schedules set their hooks on it once."""
        if vp_stage is None or vp_stage == 0:
            self._shared = self.finalized()
        return self._shared

    def _moe_pattern(self) -> list[bool]:
        if self.num_moe_experts is None:
            return [False] * self.num_layers
        frequency = self.moe_layer_freq
        if isinstance(frequency, int):
            return [layer % frequency == 0 for layer in range(self.num_layers)]
        return [bool(is_moe) for is_moe in frequency]

    def _mlp_weights(self, is_moe: bool) -> int:
        """Weights of one layer's MLP that a token is multiplied with."""
        matrices = 3 if self.gated_linear_unit else 2
        width = self.ffn_hidden_size or 4 * self.hidden_size
        if not is_moe:
            return matrices * self.hidden_size * width
        experts, shared = self.num_moe_experts or 0, self.moe_shared_expert_intermediate_size or 0
        active = self.moe_router_topk * (self.moe_ffn_hidden_size or width) + shared
        return self.hidden_size * (matrices * active + experts)


def _unshared(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def _let_transformer_engine_accumulate(model: torch.nn.Module) -> None:
    """Turn on gradient accumulation in every Transformer Engine linear of `model`.

    One switch of megatron-core's serves these and its own linear layers, which need Apex's
    extension for it; Transformer Engine needs nothing.
    """
    linears: list[Any] = [m for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    for linear in linears:
        linear.fuse_wgrad_accumulation = True


@contextlib.contextmanager
def _deprecation_held_back() -> Iterator[None]:
    """Hold back megatron-core's advice to migrate to HybridModel, which users cannot act on."""
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")

    def is_other(record: logging.LogRecord) -> bool:
        return "IS DEPRECATED" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
