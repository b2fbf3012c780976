"""Values that follow from others: precision, pipeline and loss in the sections that repeat them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config.schema.fields import parts_of
from bridge.training.contracts import DerivesFields, LeavesFieldsOpen

if TYPE_CHECKING:
    from bridge.training.config.container import ConfigContainer

_PARAMS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Derived:
    """The value of a field that follows from others."""

    value: Any
    reason: str | None = None
    """The setting that it follows from, as ``section.field=value``. None: the value is a default,
    from which the user's may differ."""

    @property
    def source(self) -> str:
        """The field that it follows from; empty without a reason."""
        return (self.reason or "").partition("=")[0]


def derived_values(config: "ConfigContainer") -> dict[str, Derived]:
    """Return the values that follow from the other values, by path.

    Values that depend on a precision or a device that is not known yet are skipped.
    """
    transformers = transformer_configs(config)
    derived: dict[str, Derived] = {}
    derived.update(_from_model_section(config))
    if config.mixed_precision.precision != "auto":
        derived.update(_from_precision(config))
    mode = config.train.loss_normalization
    for path in transformers:
        per_token = Derived(mode == "token", f"train.loss_normalization={mode}")
        derived[f"{path}.calculate_per_token_loss"] = per_token
    derived.update(_from_interleaving(config.model))
    for name in ("use_distributed_optimizer", "overlap_param_gather"):
        value = getattr(config.ddp, name)
        derived[f"optimizer.{name}"] = Derived(value, f"ddp.{name}={value}")
    for path, part in transformers.items():
        derived.update(_repeated_outside(path, part))
    return derived


def sources_of(config: "ConfigContainer") -> dict[str, str]:
    """Return, for fields of the model section, the field of the same name that they repeat."""
    return {
        path: derived.source
        for path, derived in _from_model_section(config)
        if derived.source.rpartition(".")[2] == path.rpartition(".")[2]
    }


def megatron_configs(config: "ConfigContainer") -> dict[str, ModelParallelConfig]:
    """Return the megatron-core configs in the model section, itself included, by path.

    A model of several modules has one for each of them.
    """
    return {
        path: part
        for path, part in parts_of(config.model, "model")
        if isinstance(part, ModelParallelConfig)
    }


def transformer_configs(config: "ConfigContainer") -> dict[str, TransformerConfig]:
    """Return those of `megatron_configs` that are of transformers."""
    parts = megatron_configs(config).items()
    return {path: part for path, part in parts if isinstance(part, TransformerConfig)}


def _from_model_section(config: "ConfigContainer") -> Iterator[tuple[str, Derived]]:
    model = config.model
    if isinstance(model, LeavesFieldsOpen) and config.dist.device != "auto":
        for name, value in model.open_fields(config, device=config.dist.device).items():
            yield f"model.{name}", Derived(value)
    if isinstance(model, DerivesFields):
        for name, (value, reason) in model.derived_fields(config).items():
            yield f"model.{name}", Derived(value, reason)


def _from_interleaving(model: Any) -> Mapping[str, Derived]:
    virtual = getattr(model, "virtual_pipeline_model_parallel_size", None)
    if not isinstance(model, ModelParallelConfig) or (virtual or 1) == 1:
        return {}
    # Batched p2p on two stages posts to the same rank twice, and pairs the tensors wrongly.
    reason = f"model.virtual_pipeline_model_parallel_size={virtual}"
    return {
        "model.overlap_p2p_comm": Derived(True, reason),
        "model.batch_p2p_comm": Derived(False, reason),
    }


def _repeated_outside(path: str, part: TransformerConfig) -> Mapping[str, Derived]:
    """Return the settings of optimizer and DDP that repeat a switch of the model that is on."""
    switches = (
        ("fp8", "fp8_recipe", "optimizer.fp8_recipe"),
        ("fp8_param", "fp8_param", "ddp.fp8_param_gather"),
        ("fp4_param", "fp4_param", "ddp.fp4_param_gather"),
        ("delay_wgrad_compute", "delay_wgrad_compute", "ddp.delay_wgrad_compute"),
    )
    return {
        place: Derived(getattr(part, name), f"{path}.{name}={getattr(part, name)}")
        for switch, name, place in switches
        if getattr(part, switch)
    }


def _from_precision(config: "ConfigContainer") -> Mapping[str, Derived]:
    precision = config.mixed_precision.precision
    reason = f"mixed_precision.precision={precision}"
    dtype = _PARAMS_DTYPES[precision]
    megatrons = megatron_configs(config)
    derived: dict[str, Derived] = {}
    for path, part in megatrons.items():
        # The stages send each other the residual stream.
        in_fp32 = isinstance(part, TransformerConfig) and part.fp32_residual_connection
        derived[f"{path}.pipeline_dtype"] = Derived(torch.float32 if in_fp32 else dtype, reason)
    for place in ("optimizer", *megatrons):
        derived[f"{place}.bf16"] = Derived(precision == "bf16", reason)
        derived[f"{place}.fp16"] = Derived(precision == "fp16", reason)
        derived[f"{place}.params_dtype"] = Derived(dtype, reason)
    return derived
