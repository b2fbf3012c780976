"""Fills in what follows from other values: device, precision, layout. The one place that does."""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config.container import ConfigContainer
from bridge.training.config.errors import ConfigError
from bridge.training.config.fields import default_of, fields_of
from bridge.training.config.types_check import assign, check_types
from bridge.training.config.validation import rebuilt_sections, validate

_PARAMS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(
    config: ConfigContainer, *, device: Literal["cuda", "cpu"], world_size: int
) -> ConfigContainer:
    """Return a copy of `config` in which everything is filled in and checked.

    Args:
        config: What the user asked for; it is left as it is.
        device: Where the run takes place.
        world_size: Ranks of the run, for the checks of the parallel layout.

    Raises:
        ConfigError: With every wrong type, unknown attribute and contradiction at once.
    """
    resolved, problems = resolve_collecting(config, device=device, world_size=world_size)
    if problems:
        raise ConfigError(problems, remainder=resolved)
    return resolved


def resolve_collecting(
    config: ConfigContainer,
    *,
    device: Literal["cuda", "cpu"],
    world_size: int,
    refused: Collection[str] = (),
) -> tuple[ConfigContainer, list[str]]:
    """Do what `resolve` does, and return its problems instead of raising them.

    `refused` names fields whose values were refused before: nothing is said about those.
    """
    resolved = config.copy()
    problems, wrong_type = check_types(resolved)
    refused = {*refused, *wrong_type}
    _forget_derived_values(resolved)
    resolved.dist.device = device
    if resolved.mixed_precision.precision == "auto":
        resolved.mixed_precision.precision = "bf16" if device == "cuda" else "fp32"
    problems += _fill_derived_values(resolved)
    problems += rebuilt_sections(resolved, refused)
    problems += validate(resolved, world_size=world_size, refused=refused)
    return resolved, problems


def derived_values(config: ConfigContainer) -> dict[str, tuple[Any, str]]:
    """Return what follows from the other values: path to value, and the reason in words.

    What depends on a precision that is not known yet is left out.
    """
    derived = {}
    if config.mixed_precision.precision != "auto":
        derived.update(_from_precision(config))
    model = config.model
    if isinstance(model, TransformerConfig):
        mode = config.train.loss_normalization
        derived["model.calculate_per_token_loss"] = (
            mode == "token",
            f"train.loss_normalization={mode}",
        )
    if isinstance(model, ModelParallelConfig) and _is_interleaved(model):
        # Batched p2p on two stages posts to the same rank twice, and pairs the tensors wrongly.
        virtual = model.virtual_pipeline_model_parallel_size
        reason = f"model.virtual_pipeline_model_parallel_size={virtual}"
        derived["model.overlap_p2p_comm"] = (True, reason)
        derived["model.batch_p2p_comm"] = (False, reason)
    if not config.optimizer.use_layer_wise_distributed_optimizer:
        for name in ("use_distributed_optimizer", "overlap_param_gather"):
            value = getattr(config.ddp, name)
            derived[f"optimizer.{name}"] = (value, f"ddp.{name}={value}")
    return derived


def _is_interleaved(model: ModelParallelConfig) -> bool:
    return (model.virtual_pipeline_model_parallel_size or 1) > 1


def _from_precision(config: ConfigContainer) -> dict[str, tuple[Any, str]]:
    precision = config.mixed_precision.precision
    reason = f"mixed_precision.precision={precision}"
    dtype = _PARAMS_DTYPES[precision]
    sections = ["optimizer"]
    derived: dict[str, tuple[Any, str]] = {}
    if isinstance(config.model, ModelParallelConfig):
        sections.append("model")
        # The residual stream is what travels between the stages.
        in_fp32 = (
            isinstance(config.model, TransformerConfig) and config.model.fp32_residual_connection
        )
        derived["model.pipeline_dtype"] = (torch.float32 if in_fp32 else dtype, reason)
    for section in sections:
        derived[f"{section}.bf16"] = (precision == "bf16", reason)
        derived[f"{section}.fp16"] = (precision == "fp16", reason)
        derived[f"{section}.params_dtype"] = (dtype, reason)
    return derived


def note_derived_values(config: ConfigContainer) -> None:
    """Take values that are as resolution would fill them in for derived, not for the user's.

    A resolved configuration that was saved can so be changed afterwards: what was derived follows.
    """
    config._derived = {
        path: value
        for path, (value, _) in derived_values(config).items()
        if path not in config._given and same(_get(config, path), value)
    }


def _forget_derived_values(config: ConfigContainer) -> None:
    for path, value in config._derived.items():
        if path not in config._given and same(_get(config, path), value):
            section, name = path.split(".")
            holder = getattr(config, section)
            default = default_of(fields_of(holder)[name])
            if default is not dataclasses.MISSING:
                assign(holder, name, default)


def _fill_derived_values(config: ConfigContainer) -> list[str]:
    problems = []
    for path, (value, reason) in derived_values(config).items():
        section, name = path.split(".")
        holder = getattr(config, section)
        present = getattr(holder, name)
        default = default_of(fields_of(holder)[name])
        if not same(present, value) and (path in config._given or not same(present, default)):
            problems.append(
                f"{path}={_text(present)} contradicts {reason}, from which {_text(value)} follows: "
                f"remove the one or change the other"
            )
        assign(holder, name, value)
    note_derived_values(config)
    return problems


def _get(config: ConfigContainer, path: str) -> Any:
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def same(left: Any, right: Any) -> bool:
    """Tell whether two field values are equal and of one type (1 is not True)."""
    return type(left) is type(right) and bool(left == right)


def _text(value: Any) -> str:
    return str(value).removeprefix("torch.").lower()
