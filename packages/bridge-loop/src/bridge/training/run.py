"""A run while it goes on: its parts, and what the loop asks of them at its fixed points."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from bridge.training import rerun
from bridge.training.callbacks import CallbackContext, Callbacks
from bridge.training.checkpointing import Checkpointer
from bridge.training.config import ConfigContainer
from bridge.training.contracts import SizedDataset
from bridge.training.data_loading import RunData
from bridge.training.distributed import Ranks, is_logging_rank
from bridge.training.evaluate import EvaluationResult, evaluate
from bridge.training.loss_adapter import LossAdapter
from bridge.training.loss_reduction import MetricReducer
from bridge.training.model_building import parameters_in_sync
from bridge.training.progress import Progress
from bridge.training.run_directory import RunDirectory
from bridge.training.state import GlobalState
from bridge.training.stop_signals import StopRequest
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
        """Save a checkpoint of this step, unless it has one; never after an unread loss."""
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
        if not alarm:
            self.forward_step.watch.clear()
            return
        for warning in self.forward_step.watch.check(self.config.train, self.ranks.control_group):
            self.progress.note(f"warning: {warning}")
