"""The training loop.

`train_step` needs no loop of ours: a program with its own loop calls it step by step, and keeps
control of its process groups, its data and its end (`bridge.training.setup.training_parts` builds
the arguments). `train` is our loop around it.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from bridge.training.ranks.stop_request import StopCause
from bridge.training.step import rerun
from bridge.training.step.train_step import StepResult, train_step

if TYPE_CHECKING:
    from bridge.training.run import Run

__all__ = ["StepResult", "StopReason", "train", "train_step"]

type StopReason = Literal["finished"] | StopCause


def train(run: "Run") -> StopReason:
    """Train until the last step, a signal or the end of the time limit, and save a checkpoint.

    Returns:
        The reason of the end: "finished", the name of the signal, or "time limit".
    """
    parts, settings, counters = run.parts, run.parts.config, run.parts.state.train_state
    if settings.validation.eval_at_start and counters.step == 0:
        run.validate()
    data_iterator = rerun.make_rewindable(
        settings, parts.data.training(counters.consumed_train_samples)
    )
    with _manual_garbage_collection(settings.train.manual_gc_interval) as collect_garbage:
        while counters.step < parts.data.train_iters and run.stop.cause is None:
            run.phase = f"step {counters.step + 1}"
            is_logged = _is_due(
                counters.step + 1, settings.logger.log_interval, parts.data.train_iters
            )
            run.callbacks.fire("on_step_start", run.context)
            with run.saved_before_a_suspicious_step():
                result = train_step(
                    parts.forward_step,
                    data_iterator,
                    parts.model,
                    parts.optimizer,
                    parts.scheduler,
                    parts.state,
                    pg_collection=parts.ranks.pg_collection,
                    reducer=parts.reducer,
                    is_logged=is_logged,
                    before_optimizer_step=run.before_optimizer_step,
                )
            run.callbacks.fire("on_step_end", run.context, result)
            run.log(result)
            collect_garbage(counters.step)
            if run.stop.agree(parts.ranks.control_group):
                break
            if _is_due(counters.step, settings.validation.eval_interval):
                run.validate()
            if _is_due(counters.step, settings.checkpoint.save_interval):
                run.save()
    # Before the first step there is nothing to save.
    if settings.checkpoint.save_at_end and counters.step:
        run.save()
    return run.stop.cause or "finished"


def _is_due(step: int, interval: int | None, last: int | None = None) -> bool:
    return step == last or (interval is not None and step % interval == 0)


@contextlib.contextmanager
def _manual_garbage_collection(interval: int) -> Iterator[Callable[[int], None]]:
    """Collect Python's garbage every `interval` steps instead of when Python does.

    A collection takes tens of milliseconds. When ranks collect at different steps, all of them wait
    for each. With an interval of 0 Python collects by itself.
    """

    def collect_garbage(step: int) -> None:
        if interval and step % interval == 0:
            gc.collect()

    was_enabled = gc.isenabled()
    if interval:
        gc.disable()
        gc.collect()
    try:
        yield collect_garbage
    finally:
        if interval and was_enabled:
            gc.enable()
