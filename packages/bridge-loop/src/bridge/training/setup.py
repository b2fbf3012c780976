"""Builds a run from its configuration, and holds its parts together.

Errors of the configuration come first, then those of the data, then those that only a built model
can show. The run's directory is made last, so a run that could not start leaves nothing behind.
"""

import contextlib
import random
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
from bridge.training.contracts import DataRequest
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
    _validated_at: int | None = None

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
        dataset, step = self.data.splits.validation, self.state.train_state.step
        if dataset is None or self.config.validation.eval_iters == 0 or step == self._validated_at:
            return
        self.validation = dict(self._evaluate("validation", dataset).metrics)
        self.context.validation = self.validation
        self._validated_at = step

    def test(self) -> None:
        """Evaluate on the test set, if there is one."""
        if self.data.splits.test is not None and len(self.data.splits.test):
            self._evaluate("test", self.data.splits.test)

    def save(self) -> None:
        """Save a checkpoint of this step, unless it has one; never after an unread NaN."""
        self._check_losses(alarm=True)
        phase, self.phase = self.phase, "checkpoint"
        with self.training_log.pause(), parameters_in_sync(self.model):
            path = self.checkpointer.save()
        if path is not None:
            self.progress.note(f"saved {path}")
            self.callbacks.fire("on_checkpoint_save", self.context, path)
        self.phase = phase

    def obey_rerun_machine(self) -> None:
        """Save and leave where megatron-core's rerun state machine asks for it."""
        checkpoint, exit_code = rerun.wants(self.config)
        if checkpoint:
            self.save()
        if exit_code is not None:
            raise rerun.RerunRequest(exit_code)

    def _evaluate(self, name: str, dataset: Any) -> EvaluationResult:
        phase, self.phase = self.phase, name
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
        _seed_everything(config.rng.seed, ranks, stack)
        state = GlobalState(config)
        stack.push(lambda kind, *_: state.close(failed=kind is not None))
        forward_step = adapt_forward_step(forward_step_func, state, ranks)
        _start_megatron_globals(config, ranks, stack)
        with progress.phase("data"):
            data = _build_data(config, ranks)
        with progress.phase("model"):
            model = build_model(config, ranks)
        with progress.phase("optimizer"):
            optimizer = build_optimizer(config, model)
            scheduler = build_scheduler(config, optimizer, data.train_iters)
            attach_hooks(config, model, optimizer, _timers(config, state))
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
    field_name = "checkpoint.pretrained_checkpoint"
    return resumed, None if path is None else find_checkpoint(path, field_name)


def _seed_everything(seed: int, ranks: Ranks, stack: contextlib.ExitStack) -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # A host program's own random streams go on as if we had not been here.
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    # Stages of a pipeline hold different layers and draw different dropout.
    stage_seed = seed + 100 * ranks.pg_collection.pp.rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
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


def _write_config(config: ConfigContainer, directory: RunDirectory, ranks: Ranks) -> None:
    if is_logging_rank():
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.config.write_text(config.to_yaml())
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
