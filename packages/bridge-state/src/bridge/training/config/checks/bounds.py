"""Ranges of values that fields may have, as data.

megatron-core checks few of its own fields. Wrong values of others fail in the middle of the setup
or of a step, keep a step from ever ending (recompute_num_layers=0), or silently train something
else: a beta of 1.5, a negative rate, experts that get no tokens (moe_router_topk=0).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config.derivation import transformer_configs
from bridge.training.config.schema.errors import Problem
from bridge.training.config.schema.fields import fields_of
from bridge.training.config.schema.to_plain import text_of

if TYPE_CHECKING:
    from bridge.training.config.container import ConfigContainer


@dataclass(frozen=True)
class Bound:
    """A range of valid numbers for some fields, also within lists. None is always valid."""

    fields: str
    """Their names, separated by spaces."""
    contains: Callable[[float], bool]
    wanted: str
    """The text after "must be "."""


_FRACTION: tuple[Callable[[float], bool], str] = (lambda x: 0 <= x < 1, "at least 0 and below 1")
_POSITIVE: tuple[Callable[[float], bool], str] = (lambda x: x > 0, "positive")
_NOT_NEGATIVE: tuple[Callable[[float], bool], str] = (lambda x: x >= 0, "at least 0")

SECTIONS: dict[str, tuple[Bound, ...]] = {
    "train": (
        Bound("train_iters train_samples epochs micro_batch_size global_batch_size", *_POSITIVE),
        Bound("time_limit_minutes", *_POSITIVE),
        Bound("num_workers manual_gc_interval", *_NOT_NEGATIVE),
        Bound(
            "spike_factor", lambda x: x > 1, "above 1, as a multiple of the mean of recent losses"
        ),
    ),
    "validation": (
        Bound("eval_interval time_limit_minutes", *_POSITIVE),
        Bound("eval_iters", *_NOT_NEGATIVE),
    ),
    "optimizer": (
        Bound("lr min_lr weight_decay clip_grad", *_NOT_NEGATIVE),
        Bound("adam_beta1 adam_beta2 sgd_momentum muon_momentum lion_beta1 lion_beta2", *_FRACTION),
        Bound("adam_eps decoupled_lr decoupled_min_lr", *_NOT_NEGATIVE),
        Bound(
            "grad_norm_skip_threshold loss_scale initial_loss_scale min_loss_scale "
            "loss_scale_window hysteresis muon_num_ns_steps",
            *_POSITIVE,
        ),
    ),
    "scheduler": (
        Bound("lr_warmup_fraction", *_FRACTION),
        Bound("lr_decay_iters lr_wsd_decay_iters", *_POSITIVE),
        Bound("lr_warmup_iters start_weight_decay end_weight_decay", *_NOT_NEGATIVE),
    ),
    "ddp": (Bound("bucket_size", *_POSITIVE),),
    "logger": (
        Bound("log_interval", *_POSITIVE),
        Bound("timing_log_level", lambda x: x in (0, 1, 2), "0, 1 or 2"),
    ),
    "checkpoint": (Bound("save_interval", *_POSITIVE), Bound("keep_last", *_NOT_NEGATIVE)),
    "dist": (Bound("timeout_minutes", *_POSITIVE),),
    "rng": (Bound("seed", *_NOT_NEGATIVE),),
}
MODEL = (
    # For more than 1 megatron-core rotates all channels, as for 1.
    Bound("rotary_percent", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    Bound("hidden_dropout attention_dropout", *_FRACTION),
    Bound(
        "init_method_std embedding_init_method_std layernorm_epsilon mtp_num_layers "
        "mtp_loss_scaling_factor moe_router_bias_update_rate moe_aux_loss_coeff moe_z_loss_coeff "
        "moe_input_jitter_eps",
        *_NOT_NEGATIVE,
    ),
    Bound(
        "ffn_hidden_size kv_channels recompute_num_layers mlp_chunks_for_training "
        "mup_base_hidden_size mup_base_head_dim moe_expert_capacity_factor moe_ffn_hidden_size "
        "moe_shared_expert_intermediate_size moe_router_topk activation_func_clamp_value "
        "rotary_base",
        *_POSITIVE,
    ),
)
PARALLEL_SIZES = (
    Bound(
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
        "virtual_pipeline_model_parallel_size expert_model_parallel_size "
        "expert_tensor_parallel_size",
        *_POSITIVE,
    ),
)
"""Sizes that are checked before the layout is computed from them (`parallel_layout`)."""

BALANCING = "aux_loss seq_aux_loss global_aux_loss sinkhorn quantile_balancing none".split()
"""Values of moe_router_load_balancing_type; megatron-core balances nothing for another one."""


def range_problems(config: "ConfigContainer") -> Iterator[Problem]:
    """Yield a problem for each value out of its range."""
    for name, bounds in SECTIONS.items():
        yield from bound_problems(bounds, getattr(config, name), name)
    for path, part in transformer_configs(config).items():
        yield from bound_problems(MODEL, part, path)
        yield from _expert_problems(part, path)


def bound_problems(bounds: tuple[Bound, ...], section: Any, path: str) -> Iterator[Problem]:
    """Yield a problem for each field of the section at `path` that is out of its range."""
    fields = fields_of(section)
    for bound in bounds:
        for name in bound.fields.split():
            value = getattr(section, name) if name in fields else None
            numbers = [v for v in _items(value) if isinstance(v, int | float)]
            if not all(map(bound.contains, numbers)):
                text = f"{path}.{name}={text_of(value)}: must be {bound.wanted}; change it"
                yield Problem((f"{path}.{name}",), text)


def _expert_problems(model: TransformerConfig, path: str) -> Iterator[Problem]:
    experts, chosen, frequency = model.num_moe_experts, model.moe_router_topk, model.moe_layer_freq
    if experts is None:
        return
    if chosen > experts:
        yield Problem(
            (f"{path}.moe_router_topk", f"{path}.num_moe_experts"),
            f"{path}.moe_router_topk={chosen}: a token cannot go to more than "
            f"{path}.num_moe_experts={experts} experts; lower it",
        )
    balancing = model.moe_router_load_balancing_type
    for item in _items(balancing):
        if item not in BALANCING:
            yield Problem(
                (f"{path}.moe_router_load_balancing_type",),
                f"{path}.moe_router_load_balancing_type={text_of(balancing)}: there is no "
                f"{item}; take one of {', '.join(BALANCING)}",
            )
    if isinstance(frequency, int):
        if frequency < 1:
            text = f"{path}.moe_layer_freq={frequency}: must be positive; change it"
            yield Problem((f"{path}.moe_layer_freq",), text)
    elif len(frequency) != model.num_layers:
        yield Problem(
            (f"{path}.moe_layer_freq", f"{path}.num_layers"),
            f"{path}.moe_layer_freq={text_of(frequency)}: must have a number for each of "
            f"{path}.num_layers={model.num_layers} layers; change it",
        )


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
