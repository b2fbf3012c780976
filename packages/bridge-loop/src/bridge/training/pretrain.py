"""Pretraining: set up, train, evaluate, take down."""

import contextlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridge.training.callbacks import Callbacks
from bridge.training.config import ConfigContainer, resolve
from bridge.training.launchers import rank_environment
from bridge.training.ranks.failure_watch import FailureWatch
from bridge.training.ranks.groups import choose_device, ranks_of
from bridge.training.ranks.launcher_store import is_logging_rank, world_size
from bridge.training.reporting.progress import Progress
from bridge.training.run import Run
from bridge.training.setup import set_up
from bridge.training.train import StopReason, train


@dataclass(kw_only=True, frozen=True)
class TrainResult:
    """The result of a run, equal on every rank."""

    reason: StopReason
    """"finished", the signal that asked it to stop (SIGINT, SIGTERM, SIGHUP or SIGUSR1), or
    "time limit" (train.time_limit_minutes)."""
    step: int
    """Steps done."""
    consumed_samples: int
    """Training samples drawn."""
    metrics: Mapping[str, Any]
    """The record of the last logged step."""
    validation: Mapping[str, float | None]
    """The last evaluation's metrics."""
    run_dir: Path
    """The directory of the run's files."""


def pretrain(
    config: ConfigContainer,
    forward_step_func: Callable[..., Any],
    callbacks: Sequence[object] | None = None,
    *,
    on_failure: Callable[[BaseException, str], None] | None = None,
    resume_line: Callable[[Path], str] | None = None,
) -> TrainResult:
    """Train a model as `config` says.

    Under a launcher (torchrun, Slurm, Kubernetes) every rank calls it; without one it is one rank.
    Existing process groups are used and kept; missing ones are created and destroyed.

    When one rank of several fails, all end within 30 seconds. A rank that waits in a collective
    cannot raise by then: its process ends with exit code 1. A UsageError of one rank is raised on
    all of them, and the exit code is 2.

    Args:
        config: The run; it is not changed.
        forward_step_func: The forward step, in any form that
            `bridge.training.forward_step.prepare_forward_step_func` accepts.
        callbacks: Callbacks (`bridge.training.callbacks.Callback`), called in this order.
        on_failure: Called when the run fails on this rank, before anything is taken down, with the
            exception and a line with rank, phase and error. A UsageError is reported by the rank
            that had it alone. None writes the line to standard error where there are several ranks.
        resume_line: Takes the run's directory and returns the line at the run's end about how to
            continue it. None describes it for a program that calls this function.

    Raises:
        ConfigError: The configuration has problems; the message lists all of them.
        UsageError: The callbacks, the data, the run directory or a checkpoint does not fit.
    """
    listeners = Callbacks(callbacks)
    return carry_out("pretrain", config, forward_step_func, listeners, on_failure, resume_line)


def carry_out(
    command: Literal["pretrain", "finetune"],
    config: ConfigContainer,
    forward_step_func: Callable[..., Any],
    callbacks: Callbacks,
    on_failure: Callable[[BaseException, str], None] | None,
    resume_line: Callable[[Path], str] | None,
) -> TrainResult:
    """Train, for `pretrain` and `finetune`, which differ in the checks before it.

    Args:
        command: The function that was called; the run is resumed by the command of this name.
        config: As for `pretrain`.
        forward_step_func: As for `pretrain`.
        callbacks: The run's callbacks.
        on_failure: As for `pretrain`.
        resume_line: As for `pretrain`.
    """
    with FailureWatch(on_failure) as failure_watch, contextlib.ExitStack() as stack:
        # The live line ends before a failure is reported.
        with (
            failure_watch.reporting(),
            contextlib.closing(Progress(enabled=is_logging_rank())) as progress,
        ):
            if (message := rank_environment().note) is not None:
                progress.note(message)
            device = choose_device(config.dist.device)
            config = resolve(config, device=device, world_size=world_size())
            config.command = command
            failure_watch.timeout_minutes = config.dist.timeout_minutes
            with progress.phase("process groups"):
                failure_watch.join()
                ranks = stack.enter_context(ranks_of(config, device))
            run = stack.enter_context(set_up(config, ranks, forward_step_func, callbacks, progress))
        failure_watch.phase = lambda: run.phase
        failure_watch.last_agreement = lambda: run.stop.agreed_at
        return _run(run, failure_watch, resume_line or _start_again)


def _run(run: Run, failure_watch: FailureWatch, resume_line: Callable[[Path], str]) -> TrainResult:
    with (
        failure_watch.reporting(),
        run.callbacks.training(run.context),
        # Before on_train_end, which may wait for other ranks.
        failure_watch.reporting(),
        contextlib.closing(run.progress),
        run.parts.data.workers.explained(),
    ):
        reason = train(run)
        if reason == "finished":
            run.phase = "final evaluation"
            run.validate()
            run.test()
            reason = run.stop.cause or reason
        run.evaluations.hide_outdated_validation()
        run.check_directory()
        failure_watch.accept_loss_of_store()
    run.progress.summary(_summary(run, reason, resume_line))
    counters = run.parts.state.train_state
    return TrainResult(
        reason=reason,
        step=counters.step,
        consumed_samples=counters.consumed_train_samples,
        metrics=run.parts.state.results.logged,
        validation=run.evaluations.validation,
        run_dir=run.parts.directory.path,
    )


def _start_again(run_dir: Path) -> str:
    return f"checkpoint.run_dir={str(run_dir)!r} and checkpoint.resume=True in the same program"


def _summary(run: Run, reason: StopReason, resume_line: Callable[[Path], str]) -> list[str]:
    parts, directory = run.parts, run.parts.directory
    end = "finished" if reason == "finished" else f"stopped by {reason}"
    lines = [
        f"{end} at step {parts.state.train_state.step}/{parts.data.train_iters}",
        f"run         {directory.path}",
        f"metrics     {directory.metrics}",
    ]
    if (latest := directory.latest()) is not None:
        lines.append(f"checkpoint  {latest}")
    lines.append(f"resume      {resume_line(directory.path)}")
    if parts.config.logger.tensorboard:
        curves = shlex.join(["tensorboard", "--logdir", str(directory.tensorboard)])
        lines.append(f"curves      {curves}")
    return lines + run.context.summary
