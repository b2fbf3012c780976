"""A run while it goes on: its parts, and what the loop asks of them at its fixed points."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bridge.training.batch_sizes import BatchSizes
from bridge.training.callbacks import CallbackContext, Callbacks
from bridge.training.checkpoint.checkpointer import Checkpointer
from bridge.training.config import ConfigContainer
from bridge.training.contracts import TOKENS, SizedDataset
from bridge.training.data.run_data import RunData
from bridge.training.evaluate import EvaluationResult, evaluate
from bridge.training.forward_step import prepare_forward_step_func
from bridge.training.loss.adapter import LossAdapter
from bridge.training.loss.reducer import MetricReducer
from bridge.training.model.frozen import ModelSize
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.ranks.groups import Ranks
from bridge.training.ranks.stop_request import StopRequest
from bridge.training.reporting.progress import Progress
from bridge.training.reporting.training_log import TrainingLog
from bridge.training.run_files.directory import RunDirectory
from bridge.training.state import GlobalState
from bridge.training.step import rerun
from bridge.training.step.schedule import has_sequences
from bridge.training.step.train_step import StepResult


@dataclass(kw_only=True)
class TrainingParts:
    """What `bridge.training.train.train_step` works with, built from a configuration."""

    config: ConfigContainer
    """The resolved configuration."""
    ranks: Ranks
    """The process groups."""
    state: GlobalState
    """Counters, which every step advances."""
    data: RunData
    """Gives this rank's iterators."""
    model: list[torch.nn.Module]
    """This rank's model chunks, DDP-wrapped."""
    optimizer: Any
    """megatron-core's optimizer."""
    scheduler: Any
    """megatron-core's schedule of the learning rate."""
    forward_step: LossAdapter
    """The user's forward step, adapted."""
    reducer: MetricReducer
    """Reduces the metrics of a step or an evaluation over all ranks."""
    directory: RunDirectory
    """Where checkpoints go: checkpoint.run_dir, or a new name under runs."""
    checkpointer: Checkpointer
    """Saves, and has loaded what checkpoint.resume or checkpoint.pretrained_checkpoint names."""
    restored_from: Path | None
    """The checkpoint that the run continues from, None if it starts at step 0."""
    size: ModelSize | None = None
    """Parameters of the model on all ranks, of a run that trains adapters."""
    changes: list[str] = field(default_factory=list)
    """A line for each rate that jumps where the run continues, as the configuration was changed."""


@dataclass(kw_only=True)
class Run(TrainingParts):
    """Everything that a run consists of, once it is set up."""

    callbacks: Callbacks
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
            collect=self.collect_non_loss_data,
        )

    def num_microbatches(self) -> int:
        """Return this rank's microbatches of the coming step."""
        return BatchSizes.of(self.config.train, self.ranks.model.replicas).microbatches

    @property
    def before_optimizer_step(self) -> Callable[[], None] | None:
        """Fires the callbacks that look at gradients, if there are any."""
        if not self.callbacks.has("on_before_optimizer_step"):
            return None
        return lambda: self.callbacks.fire("on_before_optimizer_step", self.context)

    def log(self, result: StepResult) -> None:
        """Take note of a step; write its row if its metrics were asked for."""
        self.training_log.add_step(result)
        reduced = result.reduced
        if reduced is None:
            return
        self.training_log.add_items(self._items(lambda: reduced.tokens))
        metrics = reduced.to_dict()
        self._check_losses(alarm=reduced.alarm)
        self.metrics = self.training_log.write(
            metrics,
            on_row=lambda row: self.callbacks.fire("on_log", self.context, row),
        )

    def validate(self) -> None:
        """Evaluate on the validation sets, once a step, and write what was found.

        If the run is asked to stop meanwhile, nothing is written and `stop.cause` says why.
        """
        metrics = self._evaluate_once("validation")
        if metrics is not None:
            self.validation = metrics
            self.context.validation = self.validation

    def test(self) -> None:
        """Evaluate on the test sets, as `validate`."""
        self._evaluate_once("test")

    def forget_old_validation(self) -> None:
        """Keep from callbacks what was found of the model as it was at an earlier step."""
        if self._evaluated_at.get("validation") != self.state.train_state.step:
            self.context.validation = {}

    def collect_non_loss_data(
        self,
        forward_step_func: Callable[..., Any] | None = None,
        name: str = "validation",
        num_samples: int | None = None,
    ) -> list[Any]:
        """Do what `CallbackContext.collect_non_loss_data` says."""
        step = self.state.train_state.step
        phase, self.phase = self.phase, f"collection of {name} data at step {step}"
        iterators, samples = self.data.evaluation(self.data.set_named(name), num_samples)
        with self.training_log.pause():
            result = evaluate(
                self.forward_step if forward_step_func is None else self._adapt(forward_step_func),
                iterators,
                self.model,
                self.state,
                num_samples=samples,
                pg_collection=self.ranks.pg_collection,
                reducer=self.reducer,
                collect_non_loss_data=True,
            )
        self.phase = phase
        return result.non_loss_data

    def recall_last_step(self) -> None:
        """Take up what was logged at the step that the run continues from.

        A run that had finished is then not evaluated a second time.
        """
        step = self.state.train_state.step
        recalled = on_first_rank(lambda: self.directory.rows_of(step), self.ranks.control_group)
        for row in recalled:
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
        """Save a checkpoint of this step, unless it has one; never after an unread loss."""
        self.check_directory()
        self._check_losses(alarm=True)
        self.training_log.add_items(self._items(self.reducer.take_tokens))
        phase, self.phase = self.phase, f"checkpoint at step {self.state.train_state.step}"
        with self.training_log.pause():
            # Whatever is saved has its rows.
            self.state.metric_loggers.sync()
            path = self.checkpointer.save()
        if path is not None:
            self.progress.note(f"saved {path}")
            self.callbacks.fire("on_checkpoint_save", self.context, path)
        self.phase = phase

    def _items(self, counted_tokens: Callable[[], int | None]) -> dict[str, int]:
        """Return what was counted since the last call, over all ranks.

        The tokens of a run are what its data counts as such, else model.seq_length of a sample,
        else what the loss function returns as num_tokens, else the samples.

        Args:
            counted_tokens: Returns the tokens of the loss function; None if it counts none.
        """
        items = self.data.take_items()
        if TOKENS not in items and not has_sequences(self.config.model):
            tokens = counted_tokens()
            if tokens is not None:
                items[TOKENS] = tokens
        return items

    def check_directory(self) -> None:
        """Look whether the run's directory is still there; on every rank.

        Raises:
            FileNotFoundError: It was deleted or moved; on every rank.
        """
        on_first_rank(self.directory.check_presence, self.ranks.control_group)

    @contextlib.contextmanager
    def saved_before_a_suspicious_step(self) -> Iterator[None]:
        """Save what was before the step where megatron-core's rerun state machine asks for it."""
        try:
            yield
        except rerun.RerunRequest as request:
            if request.checkpoint:
                self.save()
            raise

    def _evaluate_once(
        self, split: Literal["validation", "test"]
    ) -> dict[str, float | None] | None:
        """Evaluate the sets of a split; return their metrics, None where there is nothing to tell.

        That is where the split has no set, this step's evaluation is done, or the run is to stop.
        """
        step, sets = self.state.train_state.step, self.data.sets(split)
        if (
            not sets
            or self.config.validation.eval_iters == 0
            or self._evaluated_at.get(split) == step
            or self.stop.cause is not None
        ):
            return None
        phase, self.phase = self.phase, f"{split} at step {step}"
        self.context.split = split
        self.callbacks.fire("on_evaluate_start", self.context)
        with self.training_log.pause():
            results = self._evaluate(sets)
        self._check_losses(alarm=True)
        is_cut = not all(name in results and results[name].complete for name in sets)
        cause = self.stop.agreed(self.ranks.control_group)
        if is_cut:
            self._tell_of_cut(split, sets, results)
        is_discarded = is_cut and cause is not None
        metrics = {} if is_discarded else _merged(split, results)
        self.callbacks.fire("on_evaluate_end", self.context, metrics)
        self.context.split = None
        self.phase = phase
        if is_discarded:
            return None
        samples = sum(result.samples for result in results.values())
        self.training_log.write_evaluation(split, metrics, samples)
        self._evaluated_at[split] = step
        return metrics

    def _evaluate(self, sets: Mapping[str, SizedDataset]) -> dict[str, EvaluationResult]:
        """Evaluate one set after the other, each from its beginning, until it is time to stop."""
        limit = self.config.validation.time_limit_minutes
        ends_at = None if limit is None else time.monotonic() + 60 * limit

        def stop() -> bool:
            if limit is not None and self.ranks.device == "cuda":
                # Without it the clock would tell how long it took to ask for the computation.
                torch.cuda.synchronize()
            return self.stop.is_pending or (ends_at is not None and time.monotonic() >= ends_at)

        results: dict[str, EvaluationResult] = {}
        for name, dataset in sets.items():
            iterators, samples = self.data.evaluation(dataset)
            results[name] = evaluate(
                self.forward_step,
                iterators,
                self.model,
                self.state,
                num_samples=samples,
                pg_collection=self.ranks.pg_collection,
                reducer=self.reducer,
                stop=stop,
                control_group=self.ranks.control_group,
                name=name,
            )
            if not results[name].complete:
                break
        return results

    def _tell_of_cut(
        self,
        split: str,
        sets: Mapping[str, SizedDataset],
        results: Mapping[str, EvaluationResult],
    ) -> None:
        seen = ", ".join(
            f"{results[name].samples if name in results else 0} of "
            f"{self.data.evaluation_samples(dataset)} samples of {name}"
            for name, dataset in sets.items()
        )
        cause = self.stop.cause
        self.progress.note(
            f"{split} at step {self.state.train_state.step} was cut short by "
            f"{cause or 'validation.time_limit_minutes'} after {seen}"
            + ("; its metrics are discarded" if cause else "")
        )

    def _adapt(self, forward_step_func: Callable[..., Any]) -> LossAdapter:
        """Make a forward step that is only asked for data; how it weighs losses is no matter."""
        return LossAdapter(
            prepare_forward_step_func(forward_step_func, self.state),
            normalization=self.config.train.loss_normalization,
            token_slots=1,
        )

    def _check_losses(self, *, alarm: bool) -> None:
        if not alarm:
            self.forward_step.watch.clear()
            return
        for warning in self.forward_step.watch.check(self.config.train, self.ranks.control_group):
            self.progress.note(f"warning: {warning}")


def _merged(split: str, results: Mapping[str, EvaluationResult]) -> dict[str, float | None]:
    """Return the metrics of all sets of a split, by METRIC or by NAME/METRIC."""
    return {
        f"{name}/{key}".removeprefix(f"{split}/"): value
        for name, result in results.items()
        for key, value in result.metrics.items()
    }
