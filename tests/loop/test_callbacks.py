import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, override

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

import own_recipe
from bridge.training.callbacks import Callback, CallbackContext, Callbacks
from bridge.training.checkpoint.megatron_io import SaveError
from bridge.training.config import ConfigContainer
from bridge.training.finetune import finetune
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.pretrain import pretrain
from bridge.training.state import GlobalState
from bridge.training.usage_error import UsageError
from commands import run
from ranks import run_ranks
from training_runs import OwnData, OwnModule, Samples, own_run, series, token_step


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

    @override
    def on_train_start(self, context: CallbackContext) -> None:
        self._hear("on_train_start")

    @override
    def on_train_end(self, context: CallbackContext) -> None:
        self._hear("on_train_end")

    @override
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


def test_an_unknown_event_is_rejected_with_the_nearest_name() -> None:
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
def test_an_object_that_cannot_be_a_callback_is_rejected(callback: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Callbacks([callback])


@pytest.mark.parametrize("train", [pretrain, finetune])
@pytest.mark.parametrize("callbacks", [Recorder("one", []), Recorder, Callback(), 3])
def test_a_value_that_is_no_list_of_callbacks_is_rejected_before_anything_starts(
    train: Any, callbacks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"^callbacks: \w+ is not a list .*callbacks=\[\w+\(\)\]"):
        train(config, token_step, callbacks)
    said = capsys.readouterr()
    assert said.out + said.err == ""
    assert not (tmp_path / "run").exists()


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


def test_an_interrupt_in_one_end_does_not_stop_the_others(context: CallbackContext) -> None:
    def interrupted(context: CallbackContext) -> None:
        raise KeyboardInterrupt

    heard: list[Any] = []
    callbacks = Callbacks([SimpleNamespace(on_train_end=interrupted), Recorder("two", heard)])
    with pytest.raises(KeyboardInterrupt), callbacks.training(context):
        pass
    assert heard[-1] == ("two", "on_train_end")


def test_a_callback_reads_the_configuration_and_adds_to_the_summary(
    context: CallbackContext,
) -> None:
    class Closing(Callback):
        @override
        def on_train_end(self, context: CallbackContext) -> None:
            context.summary.append(f"recipe {context.config.recipe}")

    with Callbacks([Closing()]).training(context):
        pass
    assert context.summary == ["recipe gpt-tiny"]


class Everything:
    """A callback that records every event of a run, and fails in one if asked to."""

    def __init__(self, name: str, heard: list[Any], fails_in: str = "") -> None:
        self.name, self.heard, self.fails_in = name, heard, fails_in

    def __getattr__(self, event: str) -> Any:
        if event not in EVENTS:
            raise AttributeError(event)

        def hear(context: CallbackContext, *arguments: Any) -> None:
            self.heard.append((self.name, event))
            if event == "on_train_end":
                self.heard.append((self.name, context.exception))
            if event == self.fails_in:
                raise ZeroDivisionError(event)

        return hear

    @override
    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *EVENTS]


EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


def eventful_run(directory: Path) -> ConfigContainer:
    """Return a run of two steps in which everything happens after each."""
    config = own_run(directory, dataset=OwnData(validation=8))
    config.train.train_iters = 2
    config.validation.eval_interval = config.checkpoint.save_interval = 1
    return config


def test_a_run_fires_every_event_in_a_fixed_order_to_one_callback_after_the_other(
    tmp_path: Path,
) -> None:
    def body() -> list[Any]:
        heard: list[Any] = []
        pretrain(
            eventful_run(tmp_path / "run"),
            token_step,
            [Everything("first", heard), Everything("second", heard)],
        )
        return heard

    step = ["on_step_start", "on_before_optimizer_step", "on_step_end", "on_log"]
    evaluation = ["on_evaluate_start", "on_evaluate_end"]
    events = ["on_train_start", *2 * [*step, *evaluation, "on_checkpoint_save"]]
    assert set(events) == {*EVENTS} - {"on_train_end"}
    expected: list[Any] = [(name, event) for event in events for name in ("first", "second")]
    for name in ("first", "second"):
        expected += [(name, "on_train_end"), (name, None)]
    assert run_ranks(2, body, timeout=120) == [expected, expected]


@pytest.mark.parametrize("event", [*EVENTS, "forward step", "validation", "checkpoint"])
def test_every_callback_that_was_started_is_ended_wherever_the_run_fails(
    tmp_path: Path, event: str
) -> None:
    def failing_step(data_iterator: Iterator[Any], model: Any) -> Any:
        if event == ("forward step" if torch.is_grad_enabled() else "validation"):
            raise ZeroDivisionError(event)
        return token_step(data_iterator, model)

    def block_the_checkpoint(context: CallbackContext) -> None:
        if event == "checkpoint":
            (tmp_path / "run" / "checkpoints").write_text("in its way")

    def body() -> Any:
        heard: list[Any] = []
        callbacks = [
            Everything("first", heard),
            SimpleNamespace(on_train_start=block_the_checkpoint),
            Everything("fails", heard, event),
            Everything("last", heard),
        ]
        with pytest.raises((ZeroDivisionError, SaveError)) as failure:
            pretrain(eventful_run(tmp_path / "run"), failing_step, callbacks)
        error = failure.value
        started = ["first", "fails", "last"]
        if event == "on_train_start":
            started = ["first"]
        # A callback that fails in its end has ended as the others have, of a run that had not.
        causes = [None if event == "on_train_end" else error] * len(started)
        ends = [
            [cause for name, cause in heard if name == listener and not isinstance(cause, str)]
            for listener in started
        ]
        assert ends == [[cause] for cause in causes]
        assert heard.count(("last", "on_train_end")) == started.count("last")
        return type(error).__name__, error.__notes__

    ((kind, notes),) = run_ranks(1, body, timeout=120)
    assert kind == ("SaveError" if event == "checkpoint" else "ZeroDivisionError")
    named = [note for note in notes if "callback" in note]
    assert named == ([f"in callback Everything.{event}"] if event in EVENTS else [])


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradients_before_the_update_are_those_of_the_whole_step_on_every_rank(
    tmp_path: Path, world_size: int, distributed_optimizer: bool
) -> None:
    """Of both ranks' microbatches, divided by their tokens once, neither clipped nor sharded."""

    def body() -> Any:
        config = own_run(tmp_path / "run")
        config.ddp.use_distributed_optimizer = distributed_optimizer
        config.ddp.overlap_param_gather = distributed_optimizer
        config.optimizer.use_distributed_optimizer = distributed_optimizer
        seen: list[Any] = []

        class Look:
            def on_before_optimizer_step(self, context: CallbackContext) -> None:
                parameters: Any = context.model[0].named_parameters()
                seen.append(
                    {
                        name.replace("module.", ""): (p.detach().clone(), p.main_grad.clone())
                        for name, p in parameters
                    }
                )

        pretrain(config, token_step, [Look()])
        return seen

    found = run_ranks(world_size, body, timeout=120)
    norms = series(tmp_path / "run", "grad_norm")
    assert len(found[0]) == len(norms) == 5
    for step, norm in enumerate(norms):
        drawn = [Samples(24)[_drawn(8 * step + index)] for index in range(8)]
        x, y, mask = (torch.stack([sample[key] for sample in drawn]) for key in ("x", "y", "mask"))
        module = OwnModule(6, 0.0)
        module.load_state_dict({name: value for name, (value, _) in found[0][step].items()})
        (((module(x) - y) ** 2 * mask).sum() / mask.sum()).backward()
        wanted = {name: value.grad for name, value in module.named_parameters()}
        for of_rank in found:
            for name, (_, gradient) in of_rank[step].items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)
        squares = [gradient.square().sum() for gradient in wanted.values() if gradient is not None]
        assert norm == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
        assert norm > 0.5  # It is clipped there.


def _drawn(position: int) -> int:
    epoch, offset = divmod(position, 24)
    generator = torch.Generator().manual_seed(7 + epoch)
    return int(torch.randperm(24, generator=generator)[offset])


def test_what_a_callback_changes_in_the_gradients_is_what_the_optimizer_takes(
    tmp_path: Path,
) -> None:
    def body() -> Any:
        class Freeze:
            def on_before_optimizer_step(self, context: CallbackContext) -> None:
                parameters: Any = context.model[0].named_parameters()
                for name, parameter in parameters:
                    if "inner" in name:
                        parameter.main_grad.zero_()

            def on_train_start(self, context: CallbackContext) -> None:
                self.start = [p.detach().clone() for p in context.model[0].parameters()]

            def on_step_end(self, context: CallbackContext, result: Any) -> None:
                with parameters_in_sync(context.model):
                    self.end = [p.detach().clone() for p in context.model[0].parameters()]

        config = own_run(tmp_path / "run")
        config.optimizer.weight_decay = 0.0
        freeze = Freeze()
        pretrain(config, token_step, [freeze])
        return [torch.equal(*pair) for pair in zip(freeze.start, freeze.end, strict=True)]

    assert run_ranks(2, body, timeout=120) == [[True, True, False, False]] * 2


def test_a_metric_that_a_callback_adds_is_written_like_any_other(tmp_path: Path) -> None:
    def body() -> Any:
        class Add:
            def on_log(self, context: CallbackContext, metrics: dict[str, float | None]) -> None:
                metrics["steps left"] = 5.0 - context.state.train_state.step

        config = own_run(tmp_path / "run")
        config.logger.tensorboard = True
        return pretrain(config, token_step, [Add()]).metrics["steps left"]

    assert run_ranks(2, body, timeout=120) == [0.0, 0.0]
    assert series(tmp_path / "run", "steps left") == [4.0, 3.0, 2.0, 1.0, 0.0]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("steps left")]
    assert points == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0), (5, 0.0)]


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_the_command_says_in_which_callback_a_run_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nproc: str
) -> None:
    own_recipe.install(tmp_path, monkeypatch)
    ended = run("pretrain", "heckled", "--run-dir", "R", "--nproc", nproc, folder=tmp_path / "run")
    assert ended.code == 1
    assert "in callback Heckler.on_step_end\nrank 0, in step 2" in ended.err
    assert "RuntimeError: enough" in ended.err
