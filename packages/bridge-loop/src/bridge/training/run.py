"""A run in progress: its components, and the actions at the fixed points of the loop."""

import contextlib
from collections.abc import Callable, Iterator

from bridge.training.callbacks import CallbackContext, Callbacks
from bridge.training.components import TrainingParts
from bridge.training.evaluations import Evaluations
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.ranks.stop_request import StopRequest
from bridge.training.reporting.progress import Progress
from bridge.training.reporting.training_log import TrainingLog
from bridge.training.step import rerun
from bridge.training.step.train_step import StepResult

__all__ = ["Run", "TrainingParts"]


class Run:
    """A run as `bridge.training.train.train` sees it: its parts, and the actions of the loop."""

    def __init__(
        self,
        parts: TrainingParts,
        *,
        callbacks: Callbacks,
        progress: Progress,
        training_log: TrainingLog,
        stop: StopRequest,
    ) -> None:
        """Compose a run.

        Args:
            parts: The components that train.
            callbacks: The user's callbacks.
            progress: Shows the user how the run goes.
            training_log: Writes the metrics.
            stop: Knows whether the run is to stop.
        """
        self.parts = parts
        self.callbacks = callbacks
        self.progress = progress
        self.training_log = training_log
        self.stop = stop
        self.phase = "set-up"
        """The present activity of the run, for error messages."""
        self.context = CallbackContext(
            state=parts.state,
            model=parts.model,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            data=parts.data,
            pg_collection=parts.ranks.pg_collection,
        )
        self.evaluations = Evaluations(
            parts,
            context=self.context,
            callbacks=callbacks,
            progress=progress,
            training_log=training_log,
            stop=stop,
            during=self.during,
        )
        self.context.collect = self.evaluations.collect_non_loss_data

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name the phase of this block; after an error the name stays, for its message."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    @property
    def before_optimizer_step(self) -> Callable[[], None] | None:
        """Fires the callbacks that look at gradients, if there are any."""
        if not self.callbacks.has("on_before_optimizer_step"):
            return None
        return lambda: self.callbacks.fire("on_before_optimizer_step", self.context)

    def log(self, result: StepResult) -> None:
        """Count a step in the training log; write its record if its metrics were reduced."""
        self.training_log.add_step(result)
        reduced = result.reduced
        if reduced is None:
            return
        self.parts.state.token_counter.gather(is_reduced=True)
        metrics = reduced.to_dict()
        if reduced.has_anomaly:
            self.progress.warn(self.parts.check_losses())
        else:
            self.parts.forward_step.watch.clear()
        self.parts.state.results.logged = self.training_log.write(
            metrics,
            self.parts.state.token_counter.take_interval(),
            on_record=lambda record: self.callbacks.fire("on_log", self.context, record),
        )

    def validate(self) -> None:
        """Evaluate the validation sets, once a step (`Evaluations.run`)."""
        self.evaluations.run("validation")

    def test(self) -> None:
        """Evaluate the test sets, once a step (`Evaluations.run`)."""
        self.evaluations.run("test")

    def save(self) -> None:
        """Check the losses so far, then save a checkpoint of this step unless it has one."""
        self.check_directory()
        self.progress.warn(self.parts.check_losses())
        with self.during(f"checkpoint at step {self.parts.state.train_state.step}"):
            with self.training_log.pause():
                # The records of a step that is saved are durable.
                self.parts.state.metric_loggers.sync()
                path = self.parts.checkpointer.save()
            if path is not None:
                self.progress.note(f"saved {path}")
                self.callbacks.fire("on_checkpoint_save", self.context, path)

    def check_directory(self) -> None:
        """Check that the run's directory is still there; on every rank.

        Raises:
            FileNotFoundError: It was deleted or moved; on every rank.
        """
        on_first_rank(self.parts.directory.check_presence, self.parts.ranks.control_group)

    @contextlib.contextmanager
    def saved_before_a_suspicious_step(self) -> Iterator[None]:
        """Save the state before a step where megatron-core's rerun state machine asks for it."""
        try:
            yield
        except rerun.RerunRequest as request:
            if request.checkpoint:
                self.save()
            raise
