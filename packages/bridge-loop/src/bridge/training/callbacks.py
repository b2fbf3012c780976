"""Callbacks: your own code at fixed points of a run, without a change to the loop.

A callback is an instance of `Callback`, or of any class that defines some of its ``on_*``
methods. Callbacks run in the order given, on every rank, so they may use collectives.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from bridge.training.spelling import nearest
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from bridge.training.config import ConfigContainer
    from bridge.training.data.run_data import RunData
    from bridge.training.state import GlobalState

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CallbackContext:
    """The components of the run, which every event gets, in their present state."""

    state: "GlobalState"
    model: list[torch.nn.Module]
    """The model chunks of this rank, as wrapped for training."""
    optimizer: Any = None
    """megatron-core's optimizer; None where nothing is trained."""
    scheduler: Any = None
    """megatron-core's OptimizerParamScheduler."""
    data: "RunData | None" = None
    """The run's data."""
    pg_collection: Any = None
    """megatron-core's process groups of this rank."""
    validation: Mapping[str, float | None] = field(default_factory=dict)
    """The newest evaluation's metrics; empty before the first."""
    split: Literal["validation", "test"] | None = None
    """The split that is evaluated, in on_evaluate_start and on_evaluate_end; None elsewhere."""
    exception: BaseException | None = None
    """The error that ended the run, in on_train_end; None if it ended as planned."""
    summary: list[str] = field(default_factory=list)
    """Lines of callbacks for the summary at the end of the run."""
    collect: Callable[..., list[Any]] | None = field(default=None, repr=False)
    """The function that `collect_non_loss_data` calls; the run sets it."""

    @property
    def config(self) -> "ConfigContainer":
        """The resolved configuration."""
        return self.state.cfg

    def collect_non_loss_data(
        self,
        forward_step_func: Callable[..., Any] | None = None,
        name: str = "validation",
        num_samples: int | None = None,
    ) -> list[Any]:
        """Run the model over a validation or test set and return the data that its loss collects.

        A collective: a callback calls it on every rank, with the same arguments. The model
        computes as in an evaluation, in the schedule of its layout, in evaluation mode and without
        gradients; metrics, counters and records do not change. Each microbatch's loss
        function is called as ``loss_func(output, non_loss_data=True)`` (the keyword only where it
        takes one) and may return anything; without a loss function it is the output itself.

        Args:
            forward_step_func: A forward step in any form that `pretrain` takes; the run's own if
                None.
            name: "validation" or "test", or one of several sets: "validation/NAME".
            num_samples: Samples to draw over all ranks, from the set's beginning. As many as an
                evaluation draws if None.

        Returns:
            One item for each microbatch of this rank, in the order of the data, on the last
            pipeline stage; an empty list on the others. A microbatch has consecutive samples, and
            data-parallel rank r of D has the microbatches r, r + D, r + 2 D and so on. The last
            ones may have fewer samples than train.micro_batch_size, and some ranks have one
            microbatch less; each sample is in one of them. Tensor- and context-parallel ranks have
            an item each for the same microbatch.

        Raises:
            UsageError: There is no such set, it has fewer samples, or microbatches of the layout
                cannot hold each of them once (`bridge.training.data.evaluation_plan`).
        """
        if self.collect is None:
            raise RuntimeError("this context belongs to no run, so there is no data to collect")
        return self.collect(forward_step_func, name, num_samples)


class Callback:
    """A base class whose events do nothing: override those that you want."""

    def on_train_start(self, context: CallbackContext) -> None:
        """Before the first step; a checkpoint has been loaded if there is one."""

    def on_train_end(self, context: CallbackContext) -> None:
        """After the last step, also of a run that failed: see `context.exception`."""

    def on_step_start(self, context: CallbackContext) -> None:
        """Before a step reads its data; `context.state.train_state.step` steps are done."""

    def on_step_end(self, context: CallbackContext, result: Any) -> None:
        """After a step, with its StepResult.

        Reading its metrics is a host-device sync; only a logged step has some, those of its record
        (logger.average).
        """

    def on_before_optimizer_step(self, context: CallbackContext) -> None:
        """Before the optimizer's step: the reduced gradients are in ``main_grad``, not yet clipped.

        They are those of all microbatches, divided by the step's tokens, and unsharded on every
        rank. In fp16 they are multiplied by the loss scale.
        """

    def on_evaluate_start(self, context: CallbackContext) -> None:
        """Before an evaluation: of all validation sets, or of all test sets."""

    def on_evaluate_end(self, context: CallbackContext, results: dict[str, float | None]) -> None:
        """After an evaluation that did not fail, with its metrics, before they are written.

        They are named METRIC, or NAME/METRIC where there are several sets. `results` is empty if
        the evaluation was cut short as the run is to stop. Metrics that are added to it, equal on
        every rank, are written too, such as ``validation/METRIC``, and are in the run's result.
        """

    def on_log(self, context: CallbackContext, metrics: dict[str, float | None]) -> None:
        """Before a logged step's record is written; values added to `metrics` are written too."""

    def on_checkpoint_save(self, context: CallbackContext, path: "Path") -> None:
        """After a checkpoint is on disk at `path`."""


_EVENTS = {name: method for name, method in vars(Callback).items() if name.startswith("on_")}


class Callbacks:
    """Runs the callbacks of a run, in their order."""

    def __init__(self, callbacks: Iterable[object] | None = None) -> None:
        """Collect the events that each callback defines.

        Raises:
            UsageError: `callbacks` is no list; or a callback is a class, has no event, has an
                event of an unknown name, or one that cannot take the event's arguments.
        """
        callbacks = () if callbacks is None else callbacks
        if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
            raise UsageError(
                f"callbacks: {_name(callbacks)} is not a list of callbacks; give a list of "
                f"instances, such as callbacks=[{_name(callbacks)}()]"
            )
        self._listeners = [(callback, _handlers_of(callback)) for callback in callbacks]

    def has(self, event: str) -> bool:
        """Whether any callback listens to `event`."""
        return any(event in handlers for _, handlers in self._listeners)

    def fire(self, event: str, context: CallbackContext, *arguments: Any) -> None:
        """Call every listener of `event`; an exception names the callback and keeps its type."""
        if event not in _EVENTS:
            raise UsageError(f"no event {event!r}; events: {', '.join(_EVENTS)}")
        for callback, handlers in self._listeners:
            if event in handlers:
                _call(callback, event, handlers[event], context, *arguments)

    @contextmanager
    def training(self, context: CallbackContext) -> Iterator[None]:
        """Fire on_train_start, then on_train_end however the block ends.

        Callbacks that were not started, because an earlier one or their own on_train_start
        failed, get no on_train_end; all others do, whatever fails. The first exception is the
        one that is raised.
        """
        started = 0
        try:
            for callback, handlers in self._listeners:
                if "on_train_start" in handlers:
                    _call(callback, "on_train_start", handlers["on_train_start"], context)
                started += 1
            yield
        except BaseException as error:
            context.exception = error
            self._end_training(context, started, error)
            raise
        else:
            if failure := self._end_training(context, started, None):
                raise failure

    def _end_training(
        self, context: CallbackContext, started: int, first: BaseException | None
    ) -> BaseException | None:
        """Fire on_train_end for the callbacks that were started; return the first failure."""
        for callback, handlers in self._listeners[:started]:
            if "on_train_end" not in handlers:
                continue
            try:
                _call(callback, "on_train_end", handlers["on_train_end"], context)
            except BaseException as error:
                if first is not None:  # The error that ended the run is the one that is raised.
                    log.exception("on_train_end failed too, after %r", first)
                first = first or error
        return first


def _call(callback: object, event: str, handler: Callable[..., None], *arguments: Any) -> None:
    try:
        handler(*arguments)
    except BaseException as error:
        error.add_note(f"in callback {_name(callback)}.{event}")
        raise


def _handlers_of(callback: object) -> dict[str, Callable[..., None]]:
    """Find the events that a callback defines, and check that it can take them."""
    if inspect.isclass(callback):
        raise UsageError(f"callback {_name(callback)} is a class: pass an instance of it")
    found = {}
    for name in dir(callback):
        if not name.startswith("on_") or not callable(handler := getattr(callback, name)):
            continue
        if name not in _EVENTS:
            near = nearest(name, _EVENTS, cutoff=0.0)
            raise UsageError(
                f"callback {_name(callback)} defines {name}, which is no event; "
                f"did you mean {near}? Events: {', '.join(_EVENTS)}"
            )
        if getattr(handler, "__func__", None) is not _EVENTS[name]:
            _check_arguments(callback, name, handler)
            found[name] = handler
    if not found and not isinstance(callback, Callback):
        raise UsageError(
            f"callback {_name(callback)} defines no event. Events: {', '.join(_EVENTS)}"
        )
    return found


def _check_arguments(callback: object, event: str, handler: Callable[..., None]) -> None:
    names = list(inspect.signature(_EVENTS[event]).parameters)[1:]
    try:
        inspect.signature(handler).bind(*names)
    except TypeError as error:
        raise UsageError(
            f"{_name(callback)}.{event} must take ({', '.join(names)}): {error}"
        ) from error


def _name(callback: object) -> str:
    kind = callback if inspect.isclass(callback) else type(callback)
    return kind.__qualname__
