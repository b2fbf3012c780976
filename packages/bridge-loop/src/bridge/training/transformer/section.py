"""A transformer in a run's configuration: megatron-core's config, with its derivations deferred."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, override

import torch
from torch.nn import functional

from bridge.training.config import ConfigContainer, Problem
from bridge.training.config.checks.unsupported import rejections_in
from bridge.training.config.model_identity import model_field
from bridge.training.config.schema.to_plain import text_of
from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import has_fused_gradient_accumulation
from bridge.training.transformer.limits import LAYERS
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.training.transformer.layer_specs import has_transformer_engine


@dataclass(kw_only=True)
class TransformerSection(TransformerConfig):
    """megatron-core's transformer, of Transformer Engine's modules or of local ones.

    The values stay what the user wrote: megatron-core's own derivations run on the copy that
    `finalized` returns. Fields that stay open until the run is known (None, or auto) take the
    values of `device_defaults`.
    """

    layer_spec: Literal["auto", "transformer_engine", "local"] = model_field(
        "execution", default="auto"
    )
    """auto takes Transformer Engine's modules on a GPU where it is installed, else the local ones.
    It replaces transformer_impl."""

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
    """Modules that per-layer CUDA graphs capture; empty for full layers (megatron-core's own
    default says the same in a deprecated word)."""

    @override
    def __post_init__(self) -> None:
        """Leave the derivations to `finalized`."""

    @property
    def has_rotary_positions(self) -> bool:
        """Whether the positions are rotary embeddings."""
        return False

    def device_defaults(self, device: Literal["cuda", "cpu"]) -> dict[str, Any]:
        """Return the value that each open field takes where it was left at its default.

        Args:
            device: The device of the run.
        """
        gpu = device == "cuda"
        layer_spec = self.layer_spec
        if layer_spec == "auto":
            layer_spec = "transformer_engine" if gpu and has_transformer_engine() else "local"
        engine = gpu and layer_spec == "transformer_engine"
        moe = self.num_moe_experts is not None
        return {
            "layer_spec": layer_spec,
            # A layer that is used twice in a pass would overwrite its own first gradient.
            "gradient_accumulation_fusion": (
                gpu
                and (engine or has_fused_gradient_accumulation())
                and not self.mtp_use_repeated_layer
            ),
            # Its gradients are not the same from run to run.
            "cross_entropy_loss_fusion": gpu and not self.deterministic_mode,
            "bias_activation_fusion": gpu and self._has_fused_activation(),
            "bias_dropout_fusion": gpu,
            "apply_rope_fusion": engine and self.has_rotary_positions,
            "moe_grouped_gemm": engine and moe,
            "moe_permute_fusion": engine and moe,
            "deallocate_pipeline_outputs": self.pipeline_model_parallel_size > 1,
        }

    def finalized(self) -> TransformerConfig:
        """Return a fresh megatron-core config on which its own derivations and checks have run.

        Raises:
            ValueError, AssertionError: megatron-core found the values contradictory.
        """
        values: dict[str, Any] = {}
        for known in fields(TransformerConfig):
            value = getattr(self, known.name)
            # A switch that is still open is off.
            is_open = value is None and isinstance(known.default, bool)
            values[known.name] = False if is_open else _unshared(value)
        values["transformer_impl"] = self.layer_spec
        # megatron-core's own layers (the output layer is one) have only Apex's extension.
        values["gradient_accumulation_fusion"] &= has_fused_gradient_accumulation()
        return TransformerConfig(**values)

    def reject_open_layer_spec(self, path: str) -> None:
        """Reject a layer_spec that `device_defaults` has not decided.

        Args:
            path: Path of the section, such as "model".
        """
        if self.layer_spec == "auto":
            raise UsageError(
                f"{path}.layer_spec: 'auto' is not decided yet; pass the configuration through "
                "bridge.training.config.resolve, or give 'transformer_engine' or 'local'"
            )

    def let_modules_accumulate(self, model: torch.nn.Module) -> None:
        """Turn on gradient accumulation in every Transformer Engine linear of `model`.

        One switch of megatron-core's serves these and its own linear layers, which need Apex's
        extension for it; Transformer Engine needs nothing.
        """
        if self.gradient_accumulation_fusion and self.layer_spec == "transformer_engine":
            linears: list[Any] = [
                module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")
            ]
            for linear in linears:
                linear.fuse_wgrad_accumulation = True

    def feature_problems(self, path: str, config: ConfigContainer) -> Iterator[Problem]:
        """Yield problems that megatron-core would find only while it builds, or not at all.

        Args:
            path: Path of the section, such as "model".
            config: The run's configuration.
        """
        yield from rejections_in(self, path, config, LAYERS)
        if self.transformer_impl != "transformer_engine":
            yield Problem(
                (f"{path}.transformer_impl", f"{path}.layer_spec"),
                f"{path}.transformer_impl={self.transformer_impl}: the modules are chosen by "
                f"{path}.layer_spec (auto, transformer_engine or local); set that",
            )
        for name in (
            "multi_latent_attention",
            "experimental_attention_variant",
            "heterogeneous_block_specs",
        ):
            if value := getattr(self, name):
                text = f"{path}.{name}={text_of(value)}: is not supported; leave it out"
                yield Problem((f"{path}.{name}",), text)
        if not has_transformer_engine():
            yield from self._problems_without_engine(path)
        if self.layer_spec == "local":
            yield from self._problems_of_local_layers(path)

    def _problems_without_engine(self, path: str) -> Iterator[Problem]:
        if self.layer_spec == "transformer_engine":
            yield Problem(
                (f"{path}.layer_spec",),
                f"{path}.layer_spec=transformer_engine: megatron-core found no Transformer Engine; "
                "use auto or local, or see `bridge doctor`",
            )
        recomputed = (self.recompute_modules or []) if self.recompute_granularity else []
        if "layernorm" in recomputed:
            yield Problem(
                (f"{path}.recompute_modules",),
                f"{path}.recompute_modules={text_of(recomputed)}: recomputing layernorm needs "
                "Transformer Engine, which megatron-core did not find; leave it out of the list",
            )

    def _problems_of_local_layers(self, path: str) -> Iterator[Problem]:
        if self.num_moe_experts is not None and self.add_bias_linear:
            yield Problem(
                (f"{path}.add_bias_linear", f"{path}.layer_spec"),
                f"{path}.add_bias_linear=true: gives the experts biases, with which "
                f"megatron-core's local ones ({path}.layer_spec is local) fail in their first "
                "step; set it to false",
            )
        if self.apply_rope_fusion:
            yield Problem(
                (f"{path}.apply_rope_fusion", f"{path}.layer_spec"),
                f"{path}.apply_rope_fusion=true: needs Transformer Engine, and {path}.layer_spec "
                "is local (auto chooses it where there is no GPU or no Transformer Engine); leave "
                "it out",
            )
        if self.gradient_accumulation_fusion and not has_fused_gradient_accumulation():
            yield Problem(
                (f"{path}.gradient_accumulation_fusion",),
                f"{path}.gradient_accumulation_fusion=true: needs Transformer Engine or Apex's "
                "extension fused_weight_gradient_mlp_cuda, and neither serves this run; leave it "
                "out",
            )

    def _has_fused_activation(self) -> bool:
        # The combinations that megatron-core's MLP has a fused kernel for.
        if self.activation_func is functional.gelu:
            return self.gated_linear_unit or self.add_bias_linear
        return self.activation_func is functional.silu and self.gated_linear_unit


def _unshared(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, list | dict) else value
