"""megatron-core's LR scheduler: build it, and continue a checkpoint's.

It counts samples. Its rates are a function of the configuration and the number of samples consumed,
so a resumed run continues exactly. Step k uses the rate of k steps' samples: with a warm-up from 0
the first step has rate `scheduler.lr_warmup_init`, as in Megatron-LM.
"""

import copy
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from bridge.training.config import ConfigContainer
from bridge.training.state import TrainState

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_scheduler(
    config: ConfigContainer, optimizer: Any, samples: int
) -> "OptimizerParamScheduler":
    """Build the scheduler of learning rate and weight decay.

    Args:
        config: A resolved configuration.
        optimizer: megatron-core's optimizer.
        samples: Samples of the run.
    """
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


def scheduler_state(
    scheduler: "OptimizerParamScheduler", config: ConfigContainer
) -> dict[str, Any]:
    """Return the part of a checkpoint that a scheduler computes its rates from."""
    return {
        **scheduler.state_dict(),
        "init_lr": scheduler.init_lr,
        "wsd_decay_steps": scheduler.wsd_decay_steps,
        "lr_wsd_decay_style": scheduler.lr_wsd_decay_style,
        "samples_per_step": config.train.global_batch_size,
    }


def resume_scheduler(
    scheduler: "OptimizerParamScheduler",
    saved: Mapping[str, Any],
    config: ConfigContainer,
    done: TrainState,
) -> list[str]:
    """Continue where a checkpoint's scheduler ended; return a warning for each rate that jumps.

    In a run over steps the rate is a function of the step, whatever the batch size is: the samples
    of its steps so far are counted at the present batch size.

    Args:
        scheduler: The present one.
        saved: The checkpoint's (`scheduler_state`).
        config: The present configuration.
        done: The counters of the run.
    """
    batch = config.train.global_batch_size
    # Checkpoints of an older format lack it.
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
    """Return the learning rate of the next step: that of the first usual parameter group.

    A rank may have no such group, if its weights have learning rates of their own or are frozen.
    Then it is the scheduler's.
    """
    for group in optimizer.param_groups:
        usual = group.get("max_lr", scheduler.max_lr) == scheduler.max_lr
        if usual and group.get("default_config", True) and group.get("lr_mult", 1.0) == 1.0:
            return float(group["lr"])
    return float(scheduler.get_lr({}))
