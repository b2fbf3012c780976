import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge.training.callbacks import Callback, CallbackContext, Callbacks
from bridge.training.state import GlobalState


@pytest.fixture
def context() -> CallbackContext:
    state = GlobalState(SimpleNamespace(recipe="gpt-tiny"))  # type: ignore[arg-type]
    return CallbackContext(state=state, model=[torch.nn.Identity()])


class Recorder(Callback):
    def __init__(self, name: str, heard: list[Any], fail_in: str = "") -> None:
        self.name, self.heard, self.fail_in = name, heard, fail_in

    def _hear(self, event: str) -> None:
        self.heard.append((self.name, event))
        if event == self.fail_in:
            raise KeyError(f"{self.name} failed")

    def on_train_start(self, context: CallbackContext) -> None:
        self._hear("on_train_start")

    def on_train_end(self, context: CallbackContext) -> None:
        self._hear("on_train_end")

    def on_step_end(self, context: CallbackContext, result: Any) -> None:
        self._hear(f"on_step_end {result}")


def test_callbacks_hear_an_event_in_their_order(context: CallbackContext) -> None:
    heard: list[Any] = []
    callbacks = Callbacks([Recorder("first", heard), Recorder("second", heard)])
    callbacks.fire("on_step_end", context, 7)
    assert heard == [("first", "on_step_end 7"), ("second", "on_step_end 7")]


def test_only_events_that_are_overridden_are_listened_to(context: CallbackContext) -> None:
    callbacks = Callbacks([Recorder("one", [])])
    assert callbacks.has("on_step_end")
    assert not callbacks.has("on_before_optimizer_step")
    assert not Callbacks([Callback()]).has("on_step_end")
    callbacks.fire("on_before_optimizer_step", context)


def test_any_object_with_known_events_is_a_callback(context: CallbackContext) -> None:
    heard: list[Any] = []

    class Plain:
        on_gpu = False  # Not callable, so not an event.

        def on_log(self, context: CallbackContext, metrics: dict[str, float | None]) -> None:
            metrics["tokens seen"] = 3.0

    callbacks = Callbacks([Plain(), SimpleNamespace(on_step_start=heard.append)])
    metrics: dict[str, float | None] = {"lm loss": 2.0}
    callbacks.fire("on_log", context, metrics)
    callbacks.fire("on_step_start", context)
    assert metrics == {"lm loss": 2.0, "tokens seen": 3.0}
    assert heard == [context]


def test_an_unknown_event_is_refused_with_the_nearest_name() -> None:
    class Misspelt(Callback):
        def on_before_optimiser_step(self, context: CallbackContext) -> None: ...

    with pytest.raises(ValueError, match="did you mean on_before_optimizer_step"):
        Callbacks([Misspelt()])


@pytest.mark.parametrize(
    ("callback", "problem"),
    [
        (Recorder, "Recorder is a class: pass an instance"),
        (object(), "defines no event"),
        (SimpleNamespace(on_step_end=lambda context: None), r"must take \(context, result\)"),
    ],
)
def test_what_cannot_be_a_callback_is_refused(callback: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Callbacks([callback])


def test_an_event_that_does_not_exist_cannot_be_fired(context: CallbackContext) -> None:
    with pytest.raises(ValueError, match="no event 'on_epoch_end'"):
        Callbacks().fire("on_epoch_end", context)


def test_an_exception_keeps_its_type_and_names_callback_and_event(
    context: CallbackContext,
) -> None:
    callbacks = Callbacks([Recorder("one", [], fail_in="on_step_end 1")])
    with pytest.raises(KeyError, match="one failed") as failure:
        callbacks.fire("on_step_end", context, 1)
    assert failure.value.__notes__ == ["in callback Recorder.on_step_end"]


def test_the_end_of_training_is_heard_after_a_start(context: CallbackContext) -> None:
    heard: list[Any] = []
    with Callbacks([Recorder("one", heard)]).training(context):
        heard.append("steps")
    assert heard == [("one", "on_train_start"), "steps", ("one", "on_train_end")]
    assert context.exception is None


@pytest.mark.parametrize("error", [ValueError("NaN"), KeyboardInterrupt()])
def test_the_end_of_a_failed_run_is_heard_with_its_exception(
    error: BaseException, context: CallbackContext
) -> None:
    seen: list[BaseException | None] = []
    callbacks = Callbacks([SimpleNamespace(on_train_end=lambda c: seen.append(c.exception))])
    with pytest.raises(type(error)), callbacks.training(context):
        raise error
    assert seen == [error]


def test_callbacks_that_were_not_started_do_not_hear_the_end(context: CallbackContext) -> None:
    heard: list[Any] = []
    callbacks = Callbacks(
        [
            Recorder("started", heard),
            Recorder("fails", heard, fail_in="on_train_start"),
            Recorder("never reached", heard),
        ]
    )
    with pytest.raises(KeyError, match="fails failed"), callbacks.training(context):
        heard.append("not reached")
    assert heard == [
        ("started", "on_train_start"),
        ("fails", "on_train_start"),
        ("started", "on_train_end"),
    ]


def test_a_failing_end_neither_hides_the_cause_nor_stops_the_other_ends(
    context: CallbackContext, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Any] = []
    callbacks = Callbacks([Recorder("one", heard, fail_in="on_train_end"), Recorder("two", heard)])
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ValueError, match="the cause"),
        callbacks.training(context),
    ):
        raise ValueError("the cause")
    assert heard[-1] == ("two", "on_train_end")
    assert "on_train_end failed too" in caplog.text

    with pytest.raises(KeyError, match="one failed"), callbacks.training(context):
        pass


def test_a_callback_reads_the_configuration_and_adds_to_the_summary(
    context: CallbackContext,
) -> None:
    class Closing(Callback):
        def on_train_end(self, context: CallbackContext) -> None:
            context.summary.append(f"recipe {context.config.recipe}")

    with Callbacks([Closing()]).training(context):
        pass
    assert context.summary == ["recipe gpt-tiny"]
