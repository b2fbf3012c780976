"""The optimizer and the schedule of its learning rate, both megatron-core's.

The schedule counts samples. It is a function of the configuration and the number of samples
consumed, so a resumed run continues it exactly. Step k uses the rate of k steps' samples: with a
warm-up from 0 the first step has rate `scheduler.lr_warmup_init`, as in Megatron-LM.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from bridge.training.config import ConfigContainer
from bridge.training.contracts import ModelRanks, ScalesLearningRates
from bridge.training.model.ddp import ddp_parts
from bridge.training.state import TrainState

if TYPE_CHECKING:
    import torch
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_optimizer(
    config: ConfigContainer,
    model: list[Any],
    ranks: ModelRanks,
    *,
    timers: Any = None,
) -> "MegatronOptimizer":
    """Build megatron-core's optimizer over what DDP wraps on this rank.

    Args:
        config: A resolved configuration.
        model: This rank's model chunks.
        ranks: How the model is divided over the ranks.
        timers: megatron-core's.
    """
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    # A copy: megatron-core keeps the object, and writes to it.
    optimizer_config = OptimizerConfig(
        **{
            name: value
            for name, value in vars(config.optimizer).items()
            if name in OptimizerConfig.__dataclass_fields__
            and OptimizerConfig.__dataclass_fields__[name].init
        }
    )
    if optimizer_config.min_lr is None:
        # Else the parameter groups say None, which hides the schedule's own lowest rate.
        optimizer_config.min_lr = 0.0
    optimizer_config.timers = timers
    optimizer: MegatronOptimizer = ranks.build_optimizer(
        optimizer_config, ddp_parts(model), _overrides(config.model, optimizer_config, model)
    )
    return optimizer


def _overrides(model_config: Any, optimizer_config: Any, model: list[Any]) -> dict[Any, Any]:
    """Return what megatron-core's parameter groups have that differs from the optimizer's config.

    Its own (no weight decay for biases and norms, muP's rates), and the model's learning rates.
    """
    from megatron.core.optimizer import get_mup_config_overrides, get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
    from megatron.core.utils import get_model_config

    overrides: dict[Any, Any] = get_standard_config_overrides(optimizer_config)
    built = get_model_config(model[0])
    if built.use_mup:
        overrides |= get_mup_config_overrides(
            optimizer_config, built.mup_width_mult, optimizer_config.optimizer
        )
    if not isinstance(model_config, ScalesLearningRates):
        return overrides

    # What DDP wraps may be a module within the model.
    place = next((_name_of(part, model) for part in ddp_parts(model)), "")

    def multiplier(wrapped_name: str) -> float:
        name = wrapped_name
        while name.startswith("module."):  # the wrappers of DDP and of 16 bits
            name = name.removeprefix("module.")
        return model_config.learning_rate_multiplier(place + name)

    def has(factor: float) -> Any:
        return ParamWithNamePredicate(
            name=f"learning rate times {factor}", fn=lambda _, name: multiplier(name) == factor
        )

    names = {name for part in ddp_parts(model) for name, _ in part.named_parameters()}
    for factor in sorted({multiplier(name) for name in names} - {1.0}):
        overrides[ParamKey(with_name_predicate=has(factor))] = {
            "max_lr": optimizer_config.lr * factor,
            "min_lr": optimizer_config.min_lr * factor,
        }
    return overrides


def _name_of(part: Any, model: list[Any]) -> str:
    """Return how the names of a part's parameters begin in the chunk that it is in."""
    names = (name for chunk in model for name, module in chunk.named_modules() if module is part)
    name = next(names)
    return f"{name}." if name else ""


def build_scheduler(
    config: ConfigContainer, optimizer: Any, samples: int
) -> "OptimizerParamScheduler":
    """Build the schedule of learning rate and weight decay over a run of so many samples."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule, batch = config.scheduler, config.train.global_batch_size
    decay_steps = schedule.lr_decay_iters * batch if schedule.lr_decay_iters else samples
    warmup_steps = (schedule.lr_warmup_iters or 0) * batch
    if schedule.lr_warmup_fraction is not None:
        warmup_steps = int(schedule.lr_warmup_fraction * decay_steps)
    wsd_steps = schedule.lr_wsd_decay_iters
    weight_decay = config.optimizer.weight_decay
    start_decay, end_decay = schedule.start_weight_decay, schedule.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=float(config.optimizer.lr or 0.0),
        min_lr=config.optimizer.min_lr or 0.0,
        lr_warmup_steps=min(warmup_steps, decay_steps - 1),
        lr_decay_steps=decay_steps,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=weight_decay if start_decay is None else start_decay,
        end_wd=weight_decay if end_decay is None else end_decay,
        wd_incr_steps=samples,
        wd_incr_style=schedule.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_steps * batch if wsd_steps is not None else None,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


def schedule_state(scheduler: "OptimizerParamScheduler", config: ConfigContainer) -> dict[str, Any]:
    """Return what a checkpoint holds of a schedule: all that its rates are computed from."""
    return {
        **scheduler.state_dict(),
        "init_lr": scheduler.init_lr,
        "wsd_decay_steps": scheduler.wsd_decay_steps,
        "lr_wsd_decay_style": scheduler.lr_wsd_decay_style,
        "samples_per_step": config.train.global_batch_size,
    }


def resume_schedule(
    scheduler: "OptimizerParamScheduler",
    saved: Mapping[str, Any],
    config: ConfigContainer,
    done: TrainState,
) -> list[str]:
    """Continue a schedule where a checkpoint's ended; return a warning for each rate that jumps.

    The schedule of a run over steps is a function of the step, whatever the batch size is: samples
    of its steps so far are counted at the present batch size.

    Args:
        scheduler: The present one.
        saved: The checkpoint's (`schedule_state`).
        config: The present configuration.
        done: What the run has done.
    """
    batch = config.train.global_batch_size
    # Checkpoints of an older form do not say it.
    before = saved.get("samples_per_step") or done.consumed_train_samples // max(1, done.step)
    factor = Fraction(batch, before or batch) if config.train.train_iters is not None else 1
    old = copy.copy(scheduler)
    vars(old).update(saved)
    scheduler.load_state_dict({**saved, "num_steps": int(saved["num_steps"] * factor)})
    lengthened = int(old.lr_decay_steps * factor)
    cause = ""
    if scheduler.lr_decay_steps != lengthened:
        cause = f": it decays over {scheduler.lr_decay_steps} samples, no longer {lengthened}"
        if lengthened % batch == 0:
            cause += f"; scheduler.lr_decay_iters={lengthened // batch} keeps that"
    rates = (
        ("learning rate", old.get_lr({}), scheduler.get_lr({}), cause),
        ("weight decay", old.get_wd(), scheduler.get_wd(), ""),
    )
    return [
        f"the {name} of step {done.step + 1} is {new:.6g}, and was to be {was:.6g} when the "
        f"checkpoint was saved{why}"
        for name, was, new, why in rates
        if not math.isclose(was, new, rel_tol=1e-6)
    ]


def learning_rate(optimizer: Any, scheduler: Any) -> float:
    """Return the learning rate that the next step will use: that of the first usual group.

    A rank may have none, if its weights learn at rates of their own or are frozen. Then it is that
    of the schedule.
    """
    for group in optimizer.param_groups:
        usual = group.get("max_lr", scheduler.max_lr) == scheduler.max_lr
        if usual and group.get("default_config", True) and group.get("lr_mult", 1.0) == 1.0:
            return float(group["lr"])
    return float(scheduler.get_lr({}))


@dataclass(kw_only=True, frozen=True)
class OptimizerStep:
    """The outcome of a step of the optimizer."""

    succeeded: bool
    """Whether the weights were changed."""
    grad_norm: "torch.Tensor | float | None" = None
    """L2 norm of the gradients before clipping."""
    zeros: int | None = None
    """Zeros in the gradients of all parameters, with optimizer.log_num_zeros_in_grad."""


def step_optimizer(optimizer: Any) -> OptimizerStep:
    """Step with the gradients in ``main_grad``.

    After an overflow (fp16), or where the norm is above optimizer.grad_norm_skip_threshold, it is
    not done, on any rank. megatron-core chains one optimizer for the experts to that for the other
    weights, each with a scaler; the loss is multiplied by the first's scale and gradients are
    divided by their own. So all of them follow the one that found the overflow, else the experts'
    gradients would be wrong from then on.
    """
    succeeded, grad_norm, zeros = optimizer.step()
    # A rank that holds no weights takes its step whatever the norm is.
    if succeeded and not _is_too_large(grad_norm, optimizer.config.grad_norm_skip_threshold):
        is_counted = optimizer.config.log_num_zeros_in_grad
        return OptimizerStep(
            succeeded=True, grad_norm=grad_norm, zeros=int(zeros or 0) if is_counted else None
        )
    parts = getattr(optimizer, "chained_optimizers", ())
    # Only fp16 has scalers.
    scalers = [part.grad_scaler for part in parts if getattr(part, "grad_scaler", None)]
    if len(scalers) > 1:
        # They were equal before the step, and an overflow alone lowers the count.
        found = min((scaler.state_dict() for scaler in scalers), key=_overflows_left)
        for scaler in scalers:
            scaler.load_state_dict(found)
    return OptimizerStep(succeeded=False)


def _is_too_large(grad_norm: "torch.Tensor | float | None", threshold: float) -> bool:
    # Without a threshold nothing waits for the norm.
    return grad_norm is not None and math.isfinite(threshold) and bool(grad_norm > threshold)


def _overflows_left(scaler_state: Mapping[str, Any]) -> int:
    """Return how many overflows a scaler will still bear before it lowers its scale."""
    return int(scaler_state.get("hysteresis_tracker", 0))
