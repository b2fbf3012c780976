"""Evaluations during a run: of its validation and test sets, and the collection of their data."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from bridge.training.callbacks import CallbackContext, Callbacks
from bridge.training.components import TrainingParts
from bridge.training.contracts import SizedDataset
from bridge.training.evaluate import EvaluationResult, evaluate
from bridge.training.forward_step import prepare_forward_step_func
from bridge.training.loss.normalization import LossAdapter
from bridge.training.ranks.stop_request import StopRequest
from bridge.training.reporting.progress import Progress
from bridge.training.reporting.training_log import TrainingLog
from bridge.training.state import Evaluation

type Split = Literal["validation", "test"]


class Evaluations:
    """Evaluates a run's sets, each split once a step, and reports the metrics."""

    def __init__(
        self,
        parts: TrainingParts,
        *,
        context: CallbackContext,
        callbacks: Callbacks,
        progress: Progress,
        training_log: TrainingLog,
        stop: StopRequest,
        during: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Evaluate with the components of a run.

        Args:
            parts: The components.
            context: The callbacks' context, which gets the newest validation metrics.
            callbacks: The run's callbacks.
            progress: Shows the metrics.
            training_log: Writes the metrics; the steps' time is without evaluations.
            stop: Knows whether the run is to stop.
            during: Names a phase of the run, for error messages.
        """
        self._parts = parts
        self._context = context
        self._callbacks = callbacks
        self._progress = progress
        self._training_log = training_log
        self._stop = stop
        self._during = during
        self._results = parts.state.results
        self.hide_outdated_validation()

    @property
    def validation(self) -> dict[str, float | None]:
        """The metrics of the newest validation; empty before the first."""
        newest = self._results.evaluations.get("validation")
        return {} if newest is None else newest.metrics

    def hide_outdated_validation(self) -> None:
        """Hide the newest validation from callbacks unless it is of the present step."""
        self._context.validation = self.validation if self._is_done("validation") else {}

    def run(self, split: Split) -> None:
        """Evaluate the sets of a split and write their metrics.

        Does nothing where the split has no set, was evaluated at this step, or the run is to stop.
        An evaluation that is cut short since the run is to stop is not written.
        """
        sets = self._parts.data.sets(split)
        is_off = not sets or self._parts.config.validation.eval_iters == 0
        if is_off or self._is_done(split) or self._stop.cause is not None:
            return
        step = self._parts.state.train_state.step
        with self._during(f"{split} at step {step}"):
            self._context.split = split
            self._callbacks.fire("on_evaluate_start", self._context)
            with self._training_log.pause():
                results = self._evaluate_sets(sets)
            self._progress.warn(self._parts.check_losses())
            is_cut = not all(name in results and results[name].complete for name in sets)
            is_stopping = self._stop.agree(self._parts.ranks.control_group) is not None
            if is_cut:
                self._report_cut(split, sets, results)
            is_discarded = is_cut and is_stopping
            metrics = {} if is_discarded else _merged(split, results)
            self._callbacks.fire("on_evaluate_end", self._context, metrics)
            self._context.split = None
        if is_discarded:
            return
        samples = sum(result.samples for result in results.values())
        self._training_log.write_evaluation(split, metrics, samples)
        self._results.evaluations[split] = Evaluation(step=step, metrics=metrics)
        self._parts.checkpointer.save_evaluations()
        if split == "validation":
            self._context.validation = metrics

    def collect_non_loss_data(
        self,
        forward_step_func: Callable[..., Any] | None = None,
        name: str = "validation",
        num_samples: int | None = None,
    ) -> list[Any]:
        """Do as `CallbackContext.collect_non_loss_data` documents."""
        parts = self._parts
        forward_step = parts.forward_step
        if forward_step_func is not None:
            forward_step = self._adapt_for_collection(forward_step_func)
        with (
            self._during(f"collection of {name} data at step {parts.state.train_state.step}"),
            self._training_log.pause(),
        ):
            return self._evaluate(
                forward_step,
                parts.data.set_named(name),
                num_samples,
                collect_non_loss_data=True,
            ).non_loss_data

    def _evaluate(
        self,
        forward_step: LossAdapter,
        dataset: SizedDataset,
        num_samples: int | None = None,
        **options: Any,
    ) -> EvaluationResult:
        """Evaluate a set from its beginning; `options` are those of `evaluate`."""
        parts = self._parts
        iterators, samples = parts.data.evaluation(dataset, num_samples)
        return evaluate(
            forward_step,
            iterators,
            parts.model,
            parts.state,
            num_samples=samples,
            pg_collection=parts.ranks.pg_collection,
            reducer=parts.reducer,
            **options,
        )

    def _is_done(self, split: Split) -> bool:
        newest = self._results.evaluations.get(split)
        return newest is not None and newest.step == self._parts.state.train_state.step

    def _evaluate_sets(self, sets: Mapping[str, SizedDataset]) -> dict[str, EvaluationResult]:
        """Evaluate one set after the other, each from its beginning, until it is time to stop."""
        parts = self._parts
        limit = parts.config.validation.time_limit_minutes
        ends_at = None if limit is None else time.monotonic() + 60 * limit

        def should_stop() -> bool:
            if limit is not None and parts.ranks.device == "cuda":
                # Without it the clock would measure the launch of kernels, not their execution.
                torch.cuda.synchronize()
            return self._stop.is_pending or (ends_at is not None and time.monotonic() >= ends_at)

        results: dict[str, EvaluationResult] = {}
        for name, dataset in sets.items():
            results[name] = self._evaluate(
                parts.forward_step,
                dataset,
                stop=should_stop,
                control_group=parts.ranks.control_group,
                name=name,
            )
            if not results[name].complete:
                break
        return results

    def _report_cut(
        self,
        split: Split,
        sets: Mapping[str, SizedDataset],
        results: Mapping[str, EvaluationResult],
    ) -> None:
        """Write how far an evaluation came that was cut short, and why."""
        seen = ", ".join(
            f"{results[name].samples if name in results else 0} of "
            f"{self._parts.data.evaluation_samples(dataset)} samples of {name}"
            for name, dataset in sets.items()
        )
        cause = self._stop.cause
        self._progress.note(
            f"{split} at step {self._parts.state.train_state.step} was cut short by "
            f"{cause or 'validation.time_limit_minutes'} after {seen}"
            + ("; its metrics are discarded" if cause else "")
        )

    def _adapt_for_collection(self, forward_step_func: Callable[..., Any]) -> LossAdapter:
        """Adapt a forward step whose data is collected; the weights of losses have no effect."""
        return LossAdapter(
            prepare_forward_step_func(forward_step_func, self._parts.state),
            normalization=self._parts.config.train.loss_normalization,
            padded_tokens=1,
        )


def _merged(split: Split, results: Mapping[str, EvaluationResult]) -> dict[str, float | None]:
    """Return the metrics of all sets of a split, by METRIC or by NAME/METRIC."""
    return {
        f"{name}/{key}".removeprefix(f"{split}/"): value
        for name, result in results.items()
        for key, value in result.metrics.items()
    }
