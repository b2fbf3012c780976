"""The optimizer and the schedule of its learning rate, both megatron-core's.

The schedule counts samples. It is a function of the configuration and the number of samples
consumed, so a resumed run continues it exactly. Step k uses the rate of k steps' samples: with a
warm-up from 0 the first step has rate `scheduler.lr_warmup_init`, as in Megatron-LM.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bridge.training.config import ConfigContainer
from bridge.training.contracts import ScalesLearningRates

if TYPE_CHECKING:
    import torch
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_optimizer(
    config: ConfigContainer,
    model: list[Any],
    *,
    timers: Any = None,
) -> "MegatronOptimizer":
    """Build megatron-core's optimizer over the DDP-wrapped model chunks of this rank."""
    from megatron.core.optimizer import get_megatron_optimizer
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
    # Without a collection it takes megatron-core's own groups, of which those over gloo, that
    # checkpoints gather over, have no place in a collection.
    return get_megatron_optimizer(
        optimizer_config, model, _overrides(config.model, optimizer_config, model)
    )


def _overrides(model_config: Any, optimizer_config: Any, model: list[Any]) -> dict[Any, Any]:
    """Return what megatron-core's parameter groups have that differs from the optimizer's config.

    Its own (no weight decay for biases and norms), and the model's learning rates.
    """
    from megatron.core.optimizer import get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    overrides: dict[Any, Any] = get_standard_config_overrides(optimizer_config)
    if not isinstance(model_config, ScalesLearningRates):
        return overrides

    def multiplier(wrapped_name: str) -> float:
        name = wrapped_name
        while name.startswith("module."):  # the wrappers of DDP and of 16 bits
            name = name.removeprefix("module.")
        return model_config.learning_rate_multiplier(name)

    def has(factor: float) -> Any:
        return ParamWithNamePredicate(
            name=f"learning rate times {factor}", fn=lambda _, name: multiplier(name) == factor
        )

    names = {name for chunk in model for name, _ in chunk.named_parameters()}
    for factor in sorted({multiplier(name) for name in names} - {1.0}):
        overrides[ParamKey(with_name_predicate=has(factor))] = {
            "max_lr": optimizer_config.lr * factor,
            "min_lr": optimizer_config.min_lr * factor,
        }
    return overrides


def build_scheduler(
    config: ConfigContainer, optimizer: Any, train_iters: int
) -> "OptimizerParamScheduler":
    """Build the schedule of learning rate and weight decay over `train_iters` steps."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule, batch = config.scheduler, config.train.global_batch_size
    decay_iters = schedule.lr_decay_iters or train_iters
    warmup_steps = (schedule.lr_warmup_iters or 0) * batch
    if schedule.lr_warmup_fraction is not None:
        warmup_steps = int(schedule.lr_warmup_fraction * decay_iters * batch)
    decay_steps = decay_iters * batch
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
        wd_incr_steps=train_iters * batch,
        wd_incr_style=schedule.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_steps * batch if wsd_steps is not None else None,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


def learning_rate(optimizer: Any) -> float:
    """Return the learning rate that the next step will use (that of the first scaled group)."""
    groups = optimizer.param_groups
    for group in groups:
        if group.get("default_config", True) and group.get("lr_mult", 1.0) == 1.0:
            return float(group["lr"])
    return float(groups[0]["lr"])


def step_optimizer(optimizer: Any) -> "tuple[bool, torch.Tensor | float | None]":
    """Step with the gradients in ``main_grad``; return whether it was done, and their norm.

    After an overflow (fp16) it is not done, on any rank. megatron-core chains one optimizer for
    the experts to that for the other weights, each with a scaler; the loss is multiplied by the
    first's scale and gradients are divided by their own. So all of them follow the one that found
    the overflow, else the experts' gradients would be wrong from then on.
    """
    succeeded, grad_norm, _ = optimizer.step()
    if succeeded:
        return True, grad_norm
    scalers = [part.grad_scaler for part in getattr(optimizer, "chained_optimizers", ())]
    if len(scalers) > 1:
        # They were equal before the step, and an overflow alone lowers the count.
        found = min((scaler.state_dict() for scaler in scalers), key=_overflows_left)
        for scaler in scalers:
            scaler.load_state_dict(found)
    return False, None


def _overflows_left(scaler_state: Mapping[str, Any]) -> int:
    """Return how many overflows a scaler will still bear before it lowers its scale."""
    return int(scaler_state.get("hysteresis_tracker", 0))
