"""Several validation sets, each with a name: one evaluation, one row."""

from pathlib import Path
from typing import Any, override

import pytest
import torch
from torch.nn import functional

from bridge.training.config import ConfigContainer, LoggerConfig, ValidationConfig
from bridge.training.contracts import DataSplits
from bridge.training.pretrain import pretrain
from plain_torch import plain_torch
from ranks import run_ranks
from training_runs import OwnModule, Samples, own_run, rows, series, token_step, trained
from validation_sets import FIRST, NamedData, error_of

SETS = {"wiki": 24, "code": 11}


def named_run(directory: Path, **sections: Any) -> ConfigContainer:
    values: dict[str, Any] = {
        "dataset": NamedData(validation=SETS, test={"held out": 8}),
        "validation": ValidationConfig(eval_at_start=True, eval_interval=2),
    }
    return own_run(directory, **(values | sections))


def error_with(parameters: dict[str, torch.Tensor], name: str, samples: int) -> float:
    """Return the mean squared error of a trained `OwnModule` over valid tokens, in float64."""
    module = OwnModule(6, 0.0)
    module.load_state_dict(parameters)
    data = Samples(samples, FIRST[name])
    drawn = [data[index] for index in range(samples)]
    x, y, mask = (torch.stack([s[key] for s in drawn]).double() for key in ("x", "y", "mask"))
    with torch.no_grad():
        errors = functional.mse_loss(module.double()(x), y, reduction="none") * mask
    return float(errors.sum() / mask.sum())


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_set_is_evaluated_from_its_beginning_each_time(
    tmp_path: Path, world_size: int
) -> None:
    def body() -> Any:
        result, parameters = trained(named_run(tmp_path / "run"), token_step)
        return dict(result.validation), parameters

    for validation, parameters in run_ranks(world_size, body, timeout=120):
        assert list(validation) == ["wiki/error", "code/error"]
        for name, size in SETS.items():
            value = error_with(parameters, name, size)
            assert validation[f"{name}/error"] == pytest.approx(value, rel=1e-6)
    found = [row for row in rows(tmp_path / "run") if "validation/wiki/error" in row]
    assert [list(row) for row in found] == [
        ["step", "validation/wiki/error", "validation/code/error"]
    ] * 4
    assert [row["step"] for row in found] == [0, 2, 4, 5]
    for name, size in SETS.items():
        value = error_of(7, FIRST[name], size)
        assert found[0][f"validation/{name}/error"] == pytest.approx(value, rel=1e-6)
    assert len(series(tmp_path / "run", "test/held out/error")) == 1
    wanted = plain_torch(own_run(tmp_path), pattern=2, steps=5)
    assert series(tmp_path / "run", "error") == pytest.approx(wanted.losses, rel=2e-6)


def test_one_set_that_was_given_by_name_keeps_its_name(tmp_path: Path) -> None:
    def body() -> Any:
        config = named_run(tmp_path / "run", dataset=NamedData(validation={"wiki": 8}))
        return list(pretrain(config, token_step).validation)

    assert run_ranks(1, body, timeout=120) == [["wiki/error"]]
    assert len(series(tmp_path / "run", "validation/wiki/error")) == 4


def test_no_set_is_no_evaluation(tmp_path: Path) -> None:
    def body() -> Any:
        config = named_run(tmp_path / "run", dataset=NamedData(validation={}))
        return dict(pretrain(config, token_step).validation)

    assert run_ranks(1, body, timeout=120) == [{}]


class Listener:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_evaluate_start(self, context: Any) -> None:
        self.events.append("start")

    def on_evaluate_end(self, context: Any, results: Any) -> None:
        self.events.append(list(results))

    def on_train_end(self, context: Any) -> None:
        self.events.append(list(context.validation))


def test_callbacks_hear_of_all_sets_of_a_split_together(tmp_path: Path) -> None:
    def body() -> Any:
        listener = Listener()
        pretrain(named_run(tmp_path / "run"), token_step, [listener])
        return listener.events

    both = ["wiki/error", "code/error"]
    expected = ["start", both] * 4 + ["start", ["held out/error"], both]
    assert run_ranks(1, body, timeout=120) == [expected]


def test_a_run_that_had_finished_recalls_the_metrics_of_every_set(tmp_path: Path) -> None:
    def body(resume: bool) -> Any:
        config = named_run(tmp_path / "run")
        config.checkpoint.save_at_end = True
        config.checkpoint.resume = resume
        listener = Listener()
        result = pretrain(config, token_step, [listener])
        return result.step, dict(result.validation), listener.events[-1], len(listener.events)

    first = run_ranks(2, body, False, timeout=120)
    written = rows(tmp_path / "run")
    again = run_ranks(2, body, True, timeout=120)
    assert rows(tmp_path / "run") == written
    assert [result[:3] for result in again] == [first[0][:3]] * 2
    assert [result[3] for result in again] == [1, 1]


def test_the_curves_of_every_set_are_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    def body() -> None:
        config = named_run(tmp_path / "run")
        config.logger = LoggerConfig(log_interval=1, tensorboard=True)
        pretrain(config, token_step)

    run_ranks(1, body, timeout=120)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in SETS:
        tag = f"validation/{name}/error"
        values = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in values] == [0, 2, 4, 5]
        assert [value for _, value in values] == pytest.approx(series(tmp_path / "run", tag))


def test_names_and_sets_are_kept_when_the_splits_are_a_sequence(tmp_path: Path) -> None:
    class Sequence(NamedData):
        @override
        def build(self, request: Any) -> Any:
            built: DataSplits = super().build(request)
            return [built.train, built.validation]

    def body() -> Any:
        config = named_run(tmp_path / "run", dataset=Sequence(validation=SETS))
        return list(pretrain(config, token_step).validation)

    assert run_ranks(1, body, timeout=120) == [["wiki/error", "code/error"]]


class Doubled:
    """A callback that adds a metric to those of an evaluation."""

    def on_evaluate_start(self, context: Any) -> None:
        assert context.split in ("validation", "test")

    def on_evaluate_end(self, context: Any, results: dict[str, Any]) -> None:
        assert context.split in ("validation", "test")
        if context.split == "validation":
            results["doubled"] = 2 * results["wiki/error"]

    def on_step_start(self, context: Any) -> None:
        assert context.split is None


def test_what_a_callback_adds_to_an_evaluation_is_written_and_returned(tmp_path: Path) -> None:
    def body() -> Any:
        result = pretrain(named_run(tmp_path / "run"), token_step, [Doubled()])
        return dict(result.validation)

    first, second = run_ranks(2, body, timeout=120)
    assert first["doubled"] == 2 * first["wiki/error"]
    assert second == first
    written = series(tmp_path / "run", "validation/doubled")
    assert written == [2 * value for value in series(tmp_path / "run", "validation/wiki/error")]
    assert written[-1] == first["doubled"]
    assert series(tmp_path / "run", "test/doubled") == []


def test_a_loss_that_is_not_finite_is_reported_with_the_name_of_its_set(tmp_path: Path) -> None:
    def step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        if not model.training and bool((batch["y"] == Samples(1, FIRST["code"])[0]["y"]).any()):
            batch["y"][:] = torch.nan
        return token_step(iter([batch]), model)

    def body() -> str:
        with pytest.raises(FloatingPointError) as error:
            pretrain(named_run(tmp_path / "run"), step)
        return str(error.value)

    for message in run_ranks(2, body, timeout=120):
        assert "rank 0: nan at validation/code at step 0, microbatch 0" in message
