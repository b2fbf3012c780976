"""One training step: forward and backward passes, the optimizer's step, the counters."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bridge.training.contracts import ModelRanks
from bridge.training.loss import auxiliary
from bridge.training.loss.anomalies import actions_of
from bridge.training.loss.normalization import LossAdapter
from bridge.training.loss.reduced import ReducedMetrics
from bridge.training.loss.reducer import MetricReducer
from bridge.training.model.ddp import ddp_parts, gather_gradients
from bridge.training.model.hooks import GradientFinalizer
from bridge.training.optimizer.scheduler import learning_rate
from bridge.training.optimizer.step import OptimizerStep, step_optimizer
from bridge.training.ranks.model_ranks import to_model_ranks
from bridge.training.state import GlobalState
from bridge.training.step import rerun
from bridge.training.step.pipeline_schedule import Schedule, sequence_length
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(kw_only=True, frozen=True)
class StepResult:
    """The result of one training step, made without a host-device sync."""

    learning_rate: float
    """The learning rate of this step."""
    grad_norm: torch.Tensor | float | None
    """L2 norm of the gradients of all ranks before clipping; None if the step was skipped, or if
    nothing is clipped."""
    zeros_in_grad: int | None = None
    """Zeros in the gradients of all parameters, with optimizer.log_num_zeros_in_grad; None if the
    step was skipped."""
    skipped: bool
    """Whether the optimizer's step was skipped: for its losses (train.nan_action,
    train.spike_action), or because a gradient overflowed (fp16)."""
    samples: int
    """Samples of the step, over all ranks."""
    padded_tokens: int | None
    """Samples times model.seq_length, padding included; None for a model without sequences."""
    reduced: ReducedMetrics | None
    """The metrics of this step and of the steps before it that the reducer has kept, on the device;
    None if the step is not logged."""

    @property
    def tokens(self) -> int:
        """Tokens of the step, over all ranks; 1 for each sample where nothing counts them.

        They are `padded_tokens` where the model has sequences. Otherwise they are the sum of the
        loss function's num_tokens in all steps since the last reduction: reading them needs a
        reducer and is a host-device sync, like reading `metrics`.
        """
        if self.padded_tokens is not None:
            return self.padded_tokens
        counted = None if self.reduced is None else self.reduced.tokens
        return self.samples if counted is None else counted

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """The metrics by name, equal on every rank; None for a mean over no token.

        They include the steps before this one that were called with is_logged=False.

        Reading them is a host-device sync, and a collective when some rank reported a new key: read
        them on every rank or on none.
        """
        return {} if self.reduced is None else self.reduced.to_dict()


def train_step(  # noqa: PLR0913  # as megatron-core's own loops take them
    forward_step: LossAdapter,
    data_iterator: list[Iterator[Any]],
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    state: GlobalState,
    *,
    pg_collection: "ProcessGroupCollection | ModelRanks",
    num_microbatches: int | None = None,
    reducer: MetricReducer | None = None,
    is_logged: bool = True,
    before_optimizer_step: Callable[[], None] | None = None,
) -> StepResult:
    """Train on one global batch; a collective over all ranks.

    Two actions of train.nan_action and train.spike_action on a loss that is NaN, infinite or a
    spike are carried out here, each with a host-device sync: raise_at_once and skip. For the errors
    and warnings of the others, a program with its own loop calls ``forward_step.watch.check`` where
    it reads metrics.

    A skipped step leaves parameters, buffers, optimizer, loss scale and LR scheduler as they were.
    It counts as a step all the same: its samples and random numbers are consumed, and those of its
    losses that are no anomaly enter the mean that later losses are compared with.

    ``state.train_state.consumed_tokens`` and the FLOPs grow with each step where a sample has
    model.seq_length tokens. Tokens that the data or the loss function counts are spread over the
    ranks: ``state.token_counter.gather()`` adds them, as `train` does where it logs. Saving a
    checkpoint adds them too.

    Args:
        forward_step: The result of `bridge.training.setup.adapt_forward_step`.
        data_iterator: One iterator of this rank's microbatches for each model chunk.
        model: This rank's model chunks, DDP-wrapped.
        optimizer: megatron-core's optimizer.
        scheduler: The LR scheduler; advanced by the step's samples unless the step was skipped.
        state: The run's state; its counters are advanced.
        pg_collection: The process groups.
        num_microbatches: Microbatches of this rank; from the batch sizes if None.
        reducer: Reduces the metrics; None reduces none, which saves the collective.
        is_logged: Whether to reduce the metrics now. If not, the reducer keeps them, with neither a
            collective nor a host-device sync, and the next logged step reduces them with its own
            (`bridge.training.loss_reduction`).
        before_optimizer_step: Called when the reduced gradients are in ``main_grad``, unsharded on
            every rank (gathered by another collective), unless the step is skipped for its losses.

    Raises:
        FloatingPointError: A loss is an anomaly whose action is raise_at_once; on every rank.
    """
    ranks = to_model_ranks(pg_collection)
    sizes = state.cfg.train.batch_sizes(ranks.replicas)
    if num_microbatches is None:
        num_microbatches = sizes.microbatches
    samples = num_microbatches * sizes.global_microbatch
    schedule = Schedule(
        forward_step=forward_step,
        data_iterator=data_iterator,
        model=model,
        ranks=ranks,
        config=state.cfg,
    )

    buffers = _Buffers(model, keep="skip" in actions_of(state.cfg.train))
    records = _compute_gradients(
        schedule, num_microbatches, optimizer, state, has_metrics=reducer is not None
    )

    rate = learning_rate(optimizer, scheduler)
    if forward_step.watch.should_skip_step(state.cfg.train):
        buffers.restore()
        update = OptimizerStep(succeeded=False)
    else:
        update = _update_weights(model, optimizer, before_optimizer_step)
    if update.succeeded:
        scheduler.step(increment=samples)

    state.train_state.step += 1
    state.train_state.consumed_train_samples += samples
    state.train_state.skipped_train_samples += 0 if update.succeeded else samples
    reduced = None
    if reducer is not None:
        reduced = _reduce_metrics(
            reducer,
            records,
            schedule,
            num_microbatches,
            is_skipped=not update.succeeded,
            is_logged=is_logged,
        )
    state.token_counter.add_step(
        samples,
        has_metrics=reducer is not None,
        reduced=None if reduced is None else reduced.token_count,
    )
    length = sequence_length(state.cfg.model)
    return StepResult(
        learning_rate=rate,
        grad_norm=update.grad_norm,
        zeros_in_grad=update.zeros,
        skipped=not update.succeeded,
        samples=samples,
        padded_tokens=None if length is None else samples * length,
        reduced=reduced,
    )


def _compute_gradients(
    schedule: Schedule,
    num_microbatches: int,
    optimizer: Any,
    state: GlobalState,
    *,
    has_metrics: bool,
) -> list[Any]:
    """Run the forward and backward passes, as often as the rerun state machine asks for.

    Returns:
        The microbatches' records on the last pipeline stage.
    """
    config, watch = state.cfg, schedule.forward_step.watch
    for _ in rerun.attempts(config, schedule.data_iterator):
        watch.start(f"step {state.train_state.step + 1}", spike_factor=config.train.spike_factor)
        if has_metrics:
            auxiliary.clear()
        for part in ddp_parts(schedule.model):
            part.zero_grad_buffer()
        optimizer.zero_grad()
        records = _forward_backward(schedule, num_microbatches)
    rerun.raise_if_suspicious(config)
    watch.end_step()
    return records


def _forward_backward(schedule: Schedule, num_microbatches: int) -> list[Any]:
    """Fill the gradient buffers; return the microbatches' records on the last stage."""
    from megatron.core.utils import get_model_config

    finalizer = get_model_config(schedule.model[0]).finalize_model_grads_func
    if not isinstance(finalizer, GradientFinalizer):
        raise UsageError(
            f"train_step: the model's config has finalize_model_grads_func={finalizer!r}, so its "
            "gradients might be left unreduced; call bridge.training.model.hooks.attach_hooks "
            "once, before the first step"
        )
    calls = finalizer.calls
    records = schedule.run(num_microbatches)
    if finalizer.calls != calls + 1:
        raise RuntimeError(
            f"the schedule finalized the gradients {finalizer.calls - calls} times in one step; "
            "they must be reduced and divided exactly once"
        )
    return records


def _update_weights(
    model: list[Any], optimizer: Any, before_optimizer_step: Callable[[], None] | None
) -> OptimizerStep:
    if before_optimizer_step is not None:
        gather_gradients(model)
        before_optimizer_step()
    return step_optimizer(optimizer)


def _reduce_metrics(
    reducer: MetricReducer,
    records: list[Any],
    schedule: Schedule,
    num_microbatches: int,
    *,
    is_skipped: bool,
    is_logged: bool,
) -> ReducedMetrics | None:
    """Give the step's metrics to the reducer, and reduce them if the step is logged."""
    auxiliary_losses = None
    if is_logged or reducer.average == "interval":
        groups = schedule.ranks.groups
        auxiliary_losses = auxiliary.metrics(schedule.model, num_microbatches, groups)
    reducer.add_step(records, of_all_ranks=auxiliary_losses, is_skipped=is_skipped)
    if not is_logged:
        return None
    return reducer.reduce(anomaly_flag=schedule.forward_step.watch.anomaly_flag())


class _Buffers:
    """Copies of a model's buffers, which a forward pass changes: running statistics, expert bias.

    Args:
        model: The model chunks, before the step.
        keep: Whether to make copies.
    """

    def __init__(self, model: list[Any], *, keep: bool) -> None:
        self._copies = [
            (chunk, name, buffer.detach().clone())
            for chunk in model
            for name, buffer in chunk.named_buffers()
            if keep
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy them back into the model."""
        for chunk, name, copy in self._copies:
            chunk.get_buffer(name).copy_(copy)
