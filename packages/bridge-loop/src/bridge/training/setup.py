"""The set-up of a run: everything is built from its configuration.

Errors of the configuration come first, then those of the data, then those that only a built model
can show. The run's directory is made last, so a run that could not start leaves nothing behind.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bridge.training.adapters import (
    Adapters,
    attach_adapters,
    describe_adapters,
    find_base,
)
from bridge.training.callbacks import Callbacks
from bridge.training.checkpoint.checkpointer import Checkpointer, SavedRun
from bridge.training.checkpoint.resume_rules import (
    reject_another_base,
    reject_another_model,
    reject_another_run,
)
from bridge.training.checkpoint.run_state import counters_of
from bridge.training.checkpoint.verification import Verification, missing_records
from bridge.training.config import ConfigContainer, resolve
from bridge.training.contracts import TOKENS
from bridge.training.counters import CountSources, TokenCounter
from bridge.training.data.run_data import RunData, data_request
from bridge.training.data.splits import as_splits
from bridge.training.durable_files import make_directory
from bridge.training.forward_step import prepare_forward_step_func
from bridge.training.loss.normalization import LossAdapter
from bridge.training.loss.reducer import MetricReducer
from bridge.training.megatron_import import expected_messages_held_back
from bridge.training.megatron_patches import own_loss_trackers
from bridge.training.model.building import build_model
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.model.frozen import (
    ModelSize,
    gradients_reach_recomputed_layers,
    measure_model,
)
from bridge.training.model.hooks import attach_hooks, detach_hooks
from bridge.training.optimizer.building import build_optimizer
from bridge.training.optimizer.scheduler import build_scheduler
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.ranks.determinism import deterministic_algorithms
from bridge.training.ranks.groups import Ranks, choose_device, ranks_of
from bridge.training.ranks.launcher_store import world_size
from bridge.training.ranks.seeding import restore_random_streams_at_exit, seed_all, seed_stage
from bridge.training.ranks.stop_request import stop_signals
from bridge.training.reporting.progress import Progress
from bridge.training.reporting.startup_messages import describe_run
from bridge.training.reporting.throughput import model_flops_per_token
from bridge.training.reporting.training_log import TrainingLog
from bridge.training.run import Run, TrainingParts
from bridge.training.run_files.configuration import write_config
from bridge.training.run_files.directory import RunDirectory, writing_run_files
from bridge.training.run_files.lock import directory_lock
from bridge.training.run_files.start import (
    StartingPoint,
    chosen_directory,
    cleared_on_failure,
    find_starting_point,
)
from bridge.training.state import GlobalState
from bridge.training.step import rerun
from bridge.training.step.pipeline_schedule import sequence_length


@contextlib.contextmanager
def training_parts(
    config: ConfigContainer, forward_step_func: Callable[..., Any]
) -> Iterator[TrainingParts]:
    """Build the arguments of `bridge.training.train.train_step`, for a program with its own loop.

    The program keeps everything else: signals, logging, callbacks, when to evaluate and to save.
    Existing process groups are used and kept; missing ones are created. Nothing is printed. Only
    two calls write to disk:

    - ``checkpointer.save``, which locks the run's directory from its first call until the block is
      left (`bridge.training.run_files.lock`).
    - ``state.open_loggers(step)``, for a program that logs, or whose forward step uses
      ``state.tensorboard_logger`` or ``state.wandb_logger``.

    Within the block torch, numpy and random draw from the run's streams. When it is left, the
    process is as it was before, and the model remains usable: its parameters are complete on every
    rank.

    Args:
        config: The run; it is not changed. Its validation section is not used, and its logger
            section by ``state.open_loggers`` alone.
        forward_step_func: The forward step, in any form that
            `bridge.training.forward_step.prepare_forward_step_func` accepts.

    Raises:
        ConfigError: The configuration has problems; the message lists all of them.
        UsageError: The data, the run directory or a checkpoint does not fit.
    """
    device = choose_device(config.dist.device)
    config = resolve(config, device=device, world_size=world_size())
    with (
        ranks_of(config, device) as ranks,
        chosen_directory(config, ranks.control_group, is_locked=False) as directory,
        _built(config, ranks, forward_step_func, Progress(enabled=False), directory) as parts,
        contextlib.ExitStack() as stack,
    ):
        parts.checkpointer.before_first_save = lambda: stack.enter_context(
            directory_lock(directory.path)
        )
        yield parts
        # Only after a success: it is a collective.
        with parameters_in_sync(parts.model):
            pass


@contextlib.contextmanager
def set_up(
    config: ConfigContainer,
    ranks: Ranks,
    forward_step_func: Callable[..., Any],
    callbacks: Callbacks,
    progress: Progress,
) -> Iterator[Run]:
    """Build everything that a run needs, and close it again at the end.

    Args:
        config: A resolved configuration; its run directory is filled in.
        ranks: The process groups.
        forward_step_func: The user's forward step, in any of the accepted forms.
        callbacks: The run's callbacks.
        progress: Shows the user how it goes.
    """
    limit = config.train.time_limit_minutes
    ends_at = None if limit is None else time.monotonic() + 60 * limit
    with (
        chosen_directory(config, ranks.control_group, is_locked=True) as directory,
        _built(config, ranks, forward_step_func, progress, directory) as parts,
        contextlib.ExitStack() as stack,
    ):
        with (
            cleared_on_failure(parts.directory, is_new=not config.checkpoint.resume),
            # The loggers open their files here.
            writing_run_files(parts.directory),
        ):
            messages = _prepare_directory(parts)
            run = Run(
                parts,
                callbacks=callbacks,
                progress=progress,
                training_log=_open_training_log(parts, progress),
                stop=stack.enter_context(stop_signals(ends_at)),
            )
            for line in (*describe_run(parts), *messages):
                progress.note(line)
        yield run


@contextlib.contextmanager
def _built(
    config: ConfigContainer,
    ranks: Ranks,
    forward_step_func: Callable[..., Any],
    progress: Progress,
    directory: RunDirectory,
) -> Iterator[TrainingParts]:
    """Build the components that train, with a checkpoint loaded; writes nothing to disk."""
    start = _find_starting_point(config, ranks, directory)
    with contextlib.ExitStack() as stack:
        verification = stack.enter_context(
            contextlib.closing(Verification(start.checkpoints, ranks.control_group))
        )
        stack.enter_context(_own_global_state(config, ranks))
        state = GlobalState(config)
        stack.push(lambda kind, *_: state.close(failed=kind is not None))
        forward_step = adapt_forward_step(forward_step_func, state, ranks)
        with progress.phase("data"):
            data = _build_data(config, ranks, start, verification)
            stack.push(lambda kind, *_: data.workers.close(at_once=kind is not None))
        with progress.phase("model"), verification.explaining_errors():
            model, adapters = _build_model(config, ranks, start)
            stack.enter_context(gradients_reach_recomputed_layers(model))
        size = None
        if adapters is not None:
            size = measure_model(model, ranks.model.groups)
            for line in describe_adapters(adapters, size, ranks):
                progress.note(line)
        with progress.phase("optimizer"):
            optimizer, scheduler = _build_optimizer(state, ranks, model, data.schedule_samples)
            stack.callback(detach_hooks, model)
        reducer = build_reducer(config, ranks)
        state.token_counter = _build_token_counter(state, data, reducer, size)
        saved_run = SavedRun(
            config=config,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            state=state,
            data_fingerprint=data.fingerprint,
            watch=forward_step.watch,
            base=None if adapters is None else adapters.base,
        )
        checkpointer = Checkpointer(saved_run, directory, ranks)
        changes: list[str] = []
        # The base of adapters is loaded with the model.
        if start.resumed is not None or (start.pretrained is not None and adapters is None):
            with progress.phase("checkpoint"), verification.explaining_errors():
                changes = _load_checkpoint(checkpointer, start)
        verification.finish()
        yield TrainingParts(
            config=config,
            ranks=ranks,
            state=state,
            data=data,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            forward_step=forward_step,
            reducer=reducer,
            directory=directory,
            checkpointer=checkpointer,
            restored_from=start.resumed,
            changes=changes,
            size=size,
        )


def _find_starting_point(
    config: ConfigContainer, ranks: Ranks, directory: RunDirectory
) -> StartingPoint:
    """Find the checkpoints that the run starts from, and reject those of another run or model."""
    on_first_rank(lambda: reject_another_run(directory, config), ranks.control_group)
    start = find_starting_point(config, directory)
    # The base of adapters that are resumed is recognized by its content (`reject_another_base`).
    if start.resumed is None and (pretrained := start.pretrained) is not None:
        on_first_rank(lambda: reject_another_model(pretrained, config), ranks.control_group)
    return start


def _build_data(
    config: ConfigContainer, ranks: Ranks, start: StartingPoint, verification: Verification
) -> RunData:
    # Every rank builds the same data, also where building it draws random numbers.
    seed_all(config.rng.seed)
    with verification.explaining_errors():
        done = None if start.resumed is None else counters_of(start.resumed)
    request = data_request(config, ranks.model.modules_with_inputs, done)
    return RunData(as_splits(config.dataset.build(request)), config, ranks, done)


def _build_model(
    config: ConfigContainer, ranks: Ranks, start: StartingPoint
) -> tuple[list[torch.nn.Module], Adapters | None]:
    # Reference cycles hold an earlier model; its memory is needed for this one.
    gc.collect()
    seed_stage(config.rng.seed, ranks)
    adapters = None
    if config.peft is not None:
        base = find_base(config, ranks, start.pretrained)
        adapters = Adapters(method=config.peft, base=base)
    if start.resumed is not None:
        reject_another_base(start.resumed, None if adapters is None else adapters.base)

    def adapt(chunks: list[Any]) -> None:
        if adapters is not None:
            attach_adapters(adapters, config, ranks, chunks, start.pretrained)

    # A checkpoint of adapters does not hold their base.
    loaded = start.pretrained if adapters is not None else start.pretrained or start.resumed
    return build_model(config, ranks, adapt, loaded_next=loaded is not None), adapters


def _build_optimizer(
    state: GlobalState, ranks: Ranks, model: list[torch.nn.Module], schedule_samples: int
) -> tuple[Any, Any]:
    """Build the optimizer and its LR scheduler, and attach them to the model's training."""
    config = state.cfg
    # The schedules start and stop a dozen timers a step: without a reader they only cost.
    timers = state.timers if config.logger.timing_log_level > 0 else None
    optimizer = build_optimizer(config, model, ranks.model, timers=timers)
    scheduler = build_scheduler(config, optimizer, schedule_samples)
    attach_hooks(config, model, optimizer, timers)
    return optimizer, scheduler


def _load_checkpoint(checkpointer: Checkpointer, start: StartingPoint) -> list[str]:
    """Load the checkpoint that the run starts from; return a line for each rate that jumps."""
    if start.resumed is not None:
        return checkpointer.restore(start.resumed)
    if start.pretrained is not None:
        checkpointer.load_weights(start.pretrained)
    return []


def _build_token_counter(
    state: GlobalState, data: RunData, reducer: MetricReducer, size: ModelSize | None
) -> TokenCounter:
    adapter_weights = None if size is None else size.trained_per_token
    return TokenCounter(
        state.train_state,
        model=state.cfg.model,
        flops_per_token=model_flops_per_token(state.cfg.model, adapter_weights=adapter_weights),
        sources=CountSources(
            has_data_tokens=TOKENS in data.splits.items,
            take_data_counts=data.take_counts,
            take_loss_tokens=reducer.take_tokens,
        ),
    )


def adapt_forward_step(
    forward_step_func: Callable[..., Any], state: GlobalState, ranks: Ranks
) -> LossAdapter:
    """Adapt a user's forward step to megatron-core's schedules, once.

    Raises:
        UsageError: Its signature is none of the accepted forms.
    """
    config, layout = state.cfg, ranks.layout
    tokens = config.train.micro_batch_size * (sequence_length(config.model) or 1)
    return LossAdapter(
        prepare_forward_step_func(forward_step_func, state),
        normalization=config.train.loss_normalization,
        padded_tokens=max(1, tokens // layout.context),
        context_parallel_size=layout.context,
        context_parallel_group=ranks.model.groups.cp,
        on_loss=rerun.check_loss if config.rerun.rerun_mode != "disabled" else None,
    )


def build_reducer(config: ConfigContainer, ranks: Ranks) -> MetricReducer:
    """Build the reducer whose results all ranks of the run learn."""
    groups = ranks.model.groups
    return MetricReducer(
        normalization=config.train.loss_normalization,
        contributes=ranks.model.reports_losses,
        device=torch.device(ranks.device),
        context_parallel_size=ranks.layout.context,
        context_parallel_group=groups.cp,
        average=config.logger.average,
    )


@contextlib.contextmanager
def _own_global_state(config: ConfigContainer, ranks: Ranks) -> Iterator[None]:
    """Give the run random streams, torch settings and megatron-core globals of its own."""
    from megatron.core import num_microbatches_calculator as calculator

    with contextlib.ExitStack() as stack:
        stack.enter_context(expected_messages_held_back())
        restore_random_streams_at_exit(stack)
        stack.enter_context(deterministic_algorithms(config))
        # The program's own calculator is put back with the process groups.
        calculator.unset_num_microbatches_calculator()
        calculator.init_num_microbatches_calculator(
            # Rank 0 would log its constant at every start.
            rank=1,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_size=ranks.layout.data,
        )
        stack.enter_context(own_loss_trackers())
        rerun.start_rerun_machine(config)
        yield


def _open_training_log(parts: TrainingParts, progress: Progress) -> TrainingLog:
    """Open the metric loggers, and the log that writes to them."""
    config, state = parts.config, parts.state
    state.open_loggers(state.train_state.step)
    has_loss_scale = config.mixed_precision.precision == "fp16"
    return TrainingLog(
        state=state,
        progress=progress,
        total_steps=parts.data.train_iters,
        device=parts.ranks.device,
        world_size=parts.ranks.layout.world_size,
        loss_scale=(lambda: float(parts.optimizer.get_loss_scale())) if has_loss_scale else None,
    )


def _prepare_directory(parts: TrainingParts) -> Sequence[str]:
    """Write the configuration, and make the directory's files fit the checkpoint.

    Returns:
        Startup messages, the same on every rank.

    Raises:
        UsageError: The directory cannot be written; on every rank.
    """
    config, directory, restored = parts.config, parts.directory, parts.restored_from

    def prepare() -> list[str]:
        with writing_run_files(directory):
            make_directory(directory.path)
            write_config(directory.config, config)
            if restored is not None:
                # A later start continues from the one that was chosen, not from a newer one.
                directory.publish(restored)
                return list(missing_records(directory, restored))
            if config.checkpoint.resume and (aside := directory.set_metrics_aside()) is not None:
                return [f"the records of its earlier start are in {aside}"]
        return []

    return on_first_rank(prepare, parts.ranks.control_group)
