"""What follows from other values: precision, layout and loss reach the sections that repeat them.

A field that resolution filled in must not be taken for the user's wish later. The container keeps
which those are, so that they follow when the values they came from are changed.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config.schema.fields import default_of, fields_of
from bridge.training.config.schema.paths import exists, parts_of, value_at
from bridge.training.contracts import DerivesFields, LeavesFieldsOpen

if TYPE_CHECKING:
    from bridge.training.config.container import ConfigContainer

_PARAMS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


DERIVED = "derived"
"""The key of a saved configuration that lists the fields which resolution filled in."""


def listed_as_derived(plain: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the fields that a text lists as derived and has, and a line if the list is none."""
    listed = plain.get(DERIVED) or []
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        return [], [f"{DERIVED}: expected a list of section.field, got {listed!r}"]
    return [path for path in listed if exists(plain, path)], []


def derived_values(config: "ConfigContainer") -> dict[str, tuple[Any, str | None]]:
    """Return what follows from the other values: path to value, and the reason in words.

    Without a reason it is only a default, of which the user may choose to differ. What depends on
    a precision or a device that is not known yet is left out.
    """
    derived: dict[str, tuple[Any, str | None]] = {}
    if isinstance(config.model, LeavesFieldsOpen) and config.dist.device != "auto":
        open_fields = config.model.open_fields(config, device=config.dist.device)
        derived.update({f"model.{name}": (value, None) for name, value in open_fields.items()})
    if isinstance(config.model, DerivesFields):
        follows = config.model.derived_fields(config)
        derived.update({f"model.{name}": wanted for name, wanted in follows.items()})
    megatrons = _megatron_configs(config)
    if config.mixed_precision.precision != "auto":
        derived.update(_from_precision(config, megatrons))
    for path, part in megatrons.items():
        if isinstance(part, TransformerConfig):
            mode = config.train.loss_normalization
            derived[f"{path}.calculate_per_token_loss"] = (
                mode == "token",
                f"train.loss_normalization={mode}",
            )
    model = config.model
    if isinstance(model, ModelParallelConfig) and _is_interleaved(model):
        # Batched p2p on two stages posts to the same rank twice, and pairs the tensors wrongly.
        virtual = model.virtual_pipeline_model_parallel_size
        reason = f"model.virtual_pipeline_model_parallel_size={virtual}"
        derived["model.overlap_p2p_comm"] = (True, reason)
        derived["model.batch_p2p_comm"] = (False, reason)
    for name in ("use_distributed_optimizer", "overlap_param_gather"):
        value = getattr(config.ddp, name)
        derived[f"optimizer.{name}"] = (value, f"ddp.{name}={value}")
    for path, part in megatrons.items():
        if isinstance(part, TransformerConfig):
            derived.update(_repeated_outside(path, part))
    return derived


def _repeated_outside(path: str, part: TransformerConfig) -> dict[str, tuple[Any, str | None]]:
    """Return what optimizer and DDP have to know of a switch of the model that is on."""
    switches = (
        ("fp8", "fp8_recipe", "optimizer.fp8_recipe"),
        ("fp8_param", "fp8_param", "ddp.fp8_param_gather"),
        ("fp4_param", "fp4_param", "ddp.fp4_param_gather"),
        ("delay_wgrad_compute", "delay_wgrad_compute", "ddp.delay_wgrad_compute"),
    )
    return {
        place: (getattr(part, name), f"{path}.{name}={getattr(part, name)}")
        for switch, name, place in switches
        if getattr(part, switch)
    }


def _is_interleaved(model: ModelParallelConfig) -> bool:
    return (model.virtual_pipeline_model_parallel_size or 1) > 1


def _megatron_configs(config: "ConfigContainer") -> dict[str, ModelParallelConfig]:
    """Return the model section and what is in it, by path, where it is a config of megatron-core's.

    A model of several modules has one for each of them.
    """
    return {
        path: part
        for path, part in parts_of(config.model, "model")
        if isinstance(part, ModelParallelConfig)
    }


def _from_precision(
    config: "ConfigContainer", megatrons: Mapping[str, ModelParallelConfig]
) -> dict[str, tuple[Any, str | None]]:
    precision = config.mixed_precision.precision
    reason = f"mixed_precision.precision={precision}"
    dtype = _PARAMS_DTYPES[precision]
    derived: dict[str, tuple[Any, str | None]] = {}
    for path, part in megatrons.items():
        # The residual stream is what travels between the stages.
        in_fp32 = isinstance(part, TransformerConfig) and part.fp32_residual_connection
        derived[f"{path}.pipeline_dtype"] = (torch.float32 if in_fp32 else dtype, reason)
    for place in ("optimizer", *megatrons):
        derived[f"{place}.bf16"] = (precision == "bf16", reason)
        derived[f"{place}.fp16"] = (precision == "fp16", reason)
        derived[f"{place}.params_dtype"] = (dtype, reason)
    return derived


def note_derived_values(config: "ConfigContainer", listed: Collection[str] = ()) -> None:
    """Remember which values of a configuration that was read from text are not the user's own.

    Those are the `listed` ones, and whatever is as it must be by the values it follows from. A
    saved configuration can so be changed afterwards: what was derived follows.
    """
    follows = [
        path
        for path, (value, reason) in derived_values(config).items()
        if reason is not None and same(get_value(config, path), value)
    ]
    for path in [*follows, *listed]:
        if path not in config._given:
            config._derived[path] = get_value(config, path)


def derived_paths(config: "ConfigContainer") -> list[str]:
    """Return the fields that resolution filled in and nobody changed since."""
    return [path for path, value in config._derived.items() if same(get_value(config, path), value)]


def forget_derived_values(config: "ConfigContainer") -> None:
    """Give what resolution filled in its default again, to be filled in anew."""
    for path in derived_paths(config):
        holder, name = _holder(config, path)
        default = default_of(fields_of(holder)[name])
        if path not in config._given and default is not dataclasses.MISSING:
            object.__setattr__(holder, name, default)
    config._derived = {}


def fill_derived_values(config: "ConfigContainer") -> list[str]:
    """Set every derived value; return a line for each that the user had set otherwise."""
    problems = []
    for path, (value, reason) in derived_values(config).items():
        holder, name = _holder(config, path)
        present = getattr(holder, name)
        given = path in config._given or not same(present, default_of(fields_of(holder)[name]))
        if given and reason is None:
            continue
        if given and not same(present, value):
            problems.append(
                f"{path}={_text(present)} contradicts {reason}, from which {_text(value)} follows: "
                f"remove the one or change the other"
            )
        object.__setattr__(holder, name, value)
        config._derived[path] = value
    return problems


def get_value(config: "ConfigContainer", path: str) -> Any:
    """Return the value of ``section.field``."""
    return getattr(*_holder(config, path))


def _holder(config: "ConfigContainer", path: str) -> tuple[Any, str]:
    place, _, name = path.rpartition(".")
    return value_at(config, place), name


def same(left: Any, right: Any) -> bool:
    """Tell whether two field values are equal and of one type (1 is not True)."""
    return type(left) is type(right) and bool(left == right)


def _text(value: Any) -> str:
    return str(value).removeprefix("torch.").lower()
