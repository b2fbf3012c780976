"""Builds a run from its configuration, and holds its parts together.

Errors of the configuration come first, then those of the data, then those that only a built model
can show. The run's directory is made last, so a run that could not start leaves nothing behind.
"""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bridge.training import rerun
from bridge.training.callbacks import CallbackContext, Callbacks
from bridge.training.checkpointing import Checkpointer
from bridge.training.config import ConfigContainer
from bridge.training.contracts import DataRequest, SizedDataset
from bridge.training.data_loading import RunData, as_splits
from bridge.training.distributed import Ranks, is_logging_rank
from bridge.training.evaluate import EvaluationResult, evaluate, sequence_length
from bridge.training.forward_step import prepare_forward_step_func
from bridge.training.loss_adapter import LossAdapter
from bridge.training.loss_reduction import MetricReducer
from bridge.training.megatron_import import expected_messages_held_back
from bridge.training.model_building import (
    attach_hooks,
    build_model,
    count_parameters,
    parameters_in_sync,
)
from bridge.training.optimization import build_optimizer, build_scheduler
from bridge.training.progress import Progress
from bridge.training.run_directory import (
    RunDirectory,
    find_checkpoint,
    new_run_name,
    refuse_wrong_directory,
    replace_durably,
)
from bridge.training.state import GlobalState
from bridge.training.stop_signals import StopRequest, stop_signals
from bridge.training.train import StepResult
from bridge.training.training_log import TrainingLog


@dataclass(kw_only=True)
class Run:
    """Everything that a run consists of, once it is set up."""

    config: ConfigContainer
    ranks: Ranks
    state: GlobalState
    directory: RunDirectory
    data: RunData
    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    forward_step: LossAdapter
    reducer: MetricReducer
    callbacks: Callbacks
    checkpointer: Checkpointer
    progress: Progress
    training_log: TrainingLog
    stop: StopRequest
    phase: str = "set-up"
    """What the run is doing, for error messages."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The newest logged step's row."""
    validation: dict[str, float | None] = field(default_factory=dict)
    """The newest evaluation's metrics."""
    _evaluated_at: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.context = CallbackContext(
            state=self.state,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data=self.data,
            pg_collection=self.ranks.pg_collection,
        )

    def num_microbatches(self) -> int:
        """Return this rank's microbatches of the coming step."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        return int(get_num_microbatches())

    @property
    def before_optimizer_step(self) -> Callable[[], None] | None:
        """Fires the callbacks that look at gradients, if there are any."""
        if not self.callbacks.has("on_before_optimizer_step"):
            return None
        return lambda: self.callbacks.fire("on_before_optimizer_step", self.context)

    def log(self, result: StepResult) -> None:
        """Take note of a step; write its row if its metrics were asked for."""
        self.training_log.add_step(result)
        if result.reduced is None:
            return
        metrics = dict(result.metrics)
        self._check_losses(alarm=result.reduced.alarm)
        self.metrics = self.training_log.write(
            metrics, on_row=lambda row: self.callbacks.fire("on_log", self.context, row)
        )

    def validate(self) -> None:
        """Evaluate on the validation set, once a step, and write what was found."""
        result = self._evaluate_once("validation", self.data.splits.validation)
        if result is not None:
            self.validation = dict(result.metrics)
            self.context.validation = self.validation

    def test(self) -> None:
        """Evaluate on the test set, once a step, and write what was found."""
        self._evaluate_once("test", self.data.splits.test)

    def recall_last_step(self) -> None:
        """Take up what was logged at the step that the run continues from.

        A run that had finished is then not evaluated a second time.
        """
        step = self.state.train_state.step
        recalled = [self.directory.rows_of(step) if is_logging_rank() else []]
        dist.broadcast_object_list(recalled, src=0, group=self.ranks.control_group)
        for row in recalled[0]:
            evaluated = {key.partition("/")[0] for key in row} & {"validation", "test"}
            if not evaluated:
                self.metrics = row
            for name in evaluated:
                self._evaluated_at[name] = step
            if "validation" in evaluated:
                self.validation = {
                    key.removeprefix("validation/"): value
                    for key, value in row.items()
                    if key != "step"
                }
                self.context.validation = self.validation

    def save(self) -> None:
        """Save a checkpoint of this step, unless it has one; never after an unread NaN."""
        self._check_losses(alarm=True)
        phase, self.phase = self.phase, f"checkpoint at step {self.state.train_state.step}"
        with self.training_log.pause(), parameters_in_sync(self.model):
            path = self.checkpointer.save()
        if path is not None:
            self.progress.note(f"saved {path}")
            self.callbacks.fire("on_checkpoint_save", self.context, path)
        self.phase = phase

    @contextlib.contextmanager
    def saved_before_a_suspicious_step(self) -> Iterator[None]:
        """Save what was before the step where megatron-core's rerun state machine asks for it."""
        try:
            yield
        except rerun.RerunRequest as request:
            if request.checkpoint:
                self.save()
            raise

    def _evaluate_once(self, name: str, dataset: SizedDataset | None) -> EvaluationResult | None:
        step = self.state.train_state.step
        if (
            dataset is None
            or len(dataset) == 0
            or self.config.validation.eval_iters == 0
            or self._evaluated_at.get(name) == step
        ):
            return None
        result = self._evaluate(name, dataset)
        self._evaluated_at[name] = step
        return result

    def _evaluate(self, name: str, dataset: Any) -> EvaluationResult:
        phase, self.phase = self.phase, f"{name} at step {self.state.train_state.step}"
        self.callbacks.fire("on_evaluate_start", self.context)
        iterators, samples = self.data.evaluation(dataset)
        with self.training_log.pause():
            result = evaluate(
                self.forward_step,
                iterators,
                self.model,
                self.state,
                num_samples=samples,
                pg_collection=self.ranks.pg_collection,
                reducer=self.reducer,
            )
        self._check_losses(alarm=True)
        self.training_log.write_evaluation(name, result.metrics, result.samples)
        self.callbacks.fire("on_evaluate_end", self.context, result.metrics)
        self.phase = phase
        return result

    def _check_losses(self, *, alarm: bool) -> None:
        if not self.config.train.check_for_nan:
            self.forward_step.watch.clear()
        elif alarm:
            self.forward_step.watch.raise_if_not_finite(self.ranks.control_group)
        else:
            self.forward_step.watch.clear()


@contextlib.contextmanager
def set_up(
    config: ConfigContainer,
    ranks: Ranks,
    forward_step_func: Callable[..., Any],
    callbacks: Sequence[object],
    progress: Progress,
) -> Iterator[Run]:
    """Build everything that a run needs, and close it again at the end.

    Args:
        config: A resolved configuration; its run directory is filled in.
        ranks: The process groups.
        forward_step_func: The user's forward step, in any of the accepted forms.
        callbacks: Callbacks, in the order in which they are called.
        progress: Where the user reads how it goes.
    """
    listeners = Callbacks(callbacks)
    directory = _choose_directory(config, ranks)
    checkpoint, pretrained = _find_checkpoints(config, directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(expected_messages_held_back())
        _keep_the_hosts_random_streams(stack)
        state = GlobalState(config)
        stack.push(lambda kind, *_: state.close(failed=kind is not None))
        forward_step = adapt_forward_step(forward_step_func, state, ranks)
        _start_megatron_globals(config, ranks, stack)
        with progress.phase("data"):
            # Every rank builds the same data, also where building it draws random numbers.
            _seed(config.rng.seed)
            data = _build_data(config, ranks)
        with progress.phase("model"):
            _seed_stage(config.rng.seed, ranks)
            model = build_model(config, ranks)
        with progress.phase("optimizer"):
            timers = _timers(config, state)
            optimizer = build_optimizer(config, model, timers=timers)
            scheduler = build_scheduler(config, optimizer, data.train_iters)
            attach_hooks(config, model, optimizer, timers)
        checkpointer = Checkpointer(
            directory=directory,
            config=config,
            ranks=ranks,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            train_state=state.train_state,
            data_fingerprint=data.fingerprint,
        )
        if checkpoint is not None or pretrained is not None:
            with progress.phase("checkpoint"):
                if checkpoint is not None:
                    checkpointer.restore(checkpoint)
                elif pretrained is not None:
                    checkpointer.load_weights(pretrained)
        with _nothing_left_on_failure(config, directory):
            _write_config(config, directory, ranks)
            run = Run(
                config=config,
                ranks=ranks,
                state=state,
                directory=directory,
                data=data,
                model=model,
                optimizer=optimizer,
                scheduler=scheduler,
                forward_step=forward_step,
                reducer=build_reducer(config, ranks),
                callbacks=listeners,
                checkpointer=checkpointer,
                progress=progress,
                training_log=TrainingLog(
                    config=config,
                    state=state,
                    progress=progress,
                    total_steps=data.train_iters,
                    device=ranks.device,
                    world_size=ranks.layout.world_size,
                    loss_scale=(
                        (lambda: float(optimizer.get_loss_scale()))
                        if config.mixed_precision.precision == "fp16"
                        else None
                    ),
                ),
                stop=stack.enter_context(stop_signals()),
            )
            if checkpoint is not None:
                run.recall_last_step()
            _introduce(run, checkpoint)
        yield run


def adapt_forward_step(
    forward_step_func: Callable[..., Any], state: GlobalState, ranks: Ranks
) -> LossAdapter:
    """Resolve a user's forward step, once, to what megatron-core's schedules call.

    Raises:
        ValueError: Its signature is none of the accepted forms.
    """
    config, layout = state.cfg, ranks.layout
    tokens = config.train.micro_batch_size * sequence_length(config.model)
    return LossAdapter(
        prepare_forward_step_func(forward_step_func, state),
        normalization=config.train.loss_normalization,
        token_slots=max(1, tokens // layout.context),
        context_parallel_size=layout.context,
        context_parallel_group=ranks.pg_collection.cp,
        on_loss=rerun.check_loss if config.rerun.rerun_mode != "disabled" else None,
    )


def build_reducer(config: ConfigContainer, ranks: Ranks) -> MetricReducer:
    """Build the reducer whose results all ranks of the run learn."""
    groups = ranks.pg_collection
    return MetricReducer(
        normalization=config.train.loss_normalization,
        contributes=ranks.is_last_stage and groups.tp.rank() == 0,
        device=torch.device(ranks.device),
        context_parallel_size=ranks.layout.context,
        context_parallel_group=groups.cp,
    )


def _choose_directory(config: ConfigContainer, ranks: Ranks) -> RunDirectory:
    """Settle the run's directory, the same on every rank, and refuse one that is in use."""
    chosen = [config.checkpoint.run_dir or new_run_name(config.recipe)]
    dist.broadcast_object_list(chosen, src=0, group=ranks.control_group)
    config.checkpoint.run_dir = chosen[0]
    directory = RunDirectory(Path(chosen[0]))
    # Rank 0 looks: other ranks may see a shared file system a moment later.
    held = [directory.holds_a_run()]
    dist.broadcast_object_list(held, src=0, group=ranks.control_group)
    refuse_wrong_directory(directory, resume=config.checkpoint.resume, holds_a_run=held[0])
    return directory


def _find_checkpoints(
    config: ConfigContainer, directory: RunDirectory
) -> tuple[Path | None, Path | None]:
    resumed = directory.latest() if config.checkpoint.resume else None
    path = config.checkpoint.pretrained_checkpoint
    # What a run once started from need not be there any more when it is continued.
    if path is None or resumed is not None:
        return resumed, None
    return None, find_checkpoint(path, "checkpoint.pretrained_checkpoint")


def _keep_the_hosts_random_streams(stack: contextlib.ExitStack) -> None:
    """Let a host program's own random streams go on, at the end, as if we had not been here."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    stack.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state())
    states = get_cuda_rng_tracker().get_states()
    # Not this tracker's own method: the run has another tracker.
    stack.callback(lambda: get_cuda_rng_tracker().set_states(states))


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _seed_stage(seed: int, ranks: Ranks) -> None:
    """Seed the weights and the dropout: other ones on each stage, as it has other layers."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * ranks.pg_collection.pp.rank()
    _seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def _start_megatron_globals(
    config: ConfigContainer, ranks: Ranks, stack: contextlib.ExitStack
) -> None:
    from megatron.core import num_microbatches_calculator as calculator

    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(
        # Rank 0 would log its constant at every start.
        rank=1,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_size=ranks.layout.data,
    )
    stack.callback(calculator.destroy_num_microbatches_calculator)
    rerun.start_rerun_machine(config)
    stack.callback(rerun.stop_rerun_machine)


def _timers(config: ConfigContainer, state: GlobalState) -> Any:
    # megatron-core's schedules start and stop a dozen timers a step; without a reader they cost.
    return state.timers if config.logger.timing_log_level > 0 else None


def _build_data(config: ConfigContainer, ranks: Ranks) -> RunData:
    train, eval_iters = config.train, config.validation.eval_iters
    train_samples = train.train_samples
    if train.train_iters is not None:
        train_samples = train.train_iters * train.global_batch_size
    evaluated = None if eval_iters is None else eval_iters * train.global_batch_size
    request = DataRequest(
        config=config,
        train_samples=train_samples,
        validation_samples=evaluated,
        test_samples=evaluated,
    )
    return RunData(as_splits(config.dataset.build(request)), config, ranks)


@contextlib.contextmanager
def _nothing_left_on_failure(config: ConfigContainer, directory: RunDirectory) -> Iterator[None]:
    """Remove the directory of a new run again if the run does not come to its start."""
    try:
        yield
    except BaseException:
        # It was free: a directory that holds anything is refused for a new run.
        if not config.checkpoint.resume and is_logging_rank():
            shutil.rmtree(directory.path, ignore_errors=True)
        raise


def _write_config(config: ConfigContainer, directory: RunDirectory, ranks: Ranks) -> None:
    if is_logging_rank():
        directory.path.mkdir(parents=True, exist_ok=True)
        replace_durably(directory.config, config.to_yaml())
    dist.barrier(group=ranks.control_group)


def _introduce(run: Run, checkpoint: Path | None) -> None:
    layout, train = run.ranks.layout, run.config.train
    sizes = ", ".join(
        f"{name} {size}"
        for name, size in (
            ("tensor", layout.tensor),
            ("pipeline", layout.pipeline),
            ("virtual pipeline", layout.virtual_pipeline or 1),
            ("context", layout.context),
            ("expert", layout.expert),
            ("data", layout.data),
        )
        if size > 1
    )
    samples = run.data.train_iters * train.global_batch_size
    notes = "".join(f", {value:,} {key}" for key, value in run.data.splits.notes.items())
    progress = run.progress
    progress.note(
        f"device {run.ranks.device}, {run.config.mixed_precision.precision}, "
        f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
        + (f" ({sizes})" if sizes else "")
    )
    progress.note(f"model {count_parameters(run.model):,} parameters on this rank")
    progress.note(
        f"data {samples / len(run.data.splits.train or []):.3g} epochs: {run.data.train_iters} "
        f"steps of {train.global_batch_size} samples{notes}"
    )
    if checkpoint is not None:
        progress.note(f"continues after step {run.state.train_state.step}, from {checkpoint}")
    elif run.config.checkpoint.resume:
        progress.note("the run has no checkpoint yet: it starts again at step 0")
