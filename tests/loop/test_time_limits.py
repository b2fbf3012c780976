"""Time limits and signals end a run or an evaluation on all ranks together, without damage."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core.utils import get_model_config

import own_recipe
from bridge.training.config import ConfigContainer, LoggerConfig, ValidationConfig
from bridge.training.pretrain import pretrain
from commands import run as run_command
from plain_torch import plain_torch
from ranks import run_ranks
from training_runs import OwnData, OwnModel, a_run, own_run, rows, series, token_step
from validation_sets import FIRST, NamedData, error_of, evaluated, tokens_of

AT_ONCE = 1e-9
"""A limit in minutes that is over at once."""


class Listener:
    """A callback that records events, and the mode of the modules at the end."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_start(self, context: Any) -> None:
        # A module that the user has put into eval mode.
        context.model[0].module.module.dropout.eval()
        self.modes = [module.training for module in context.model[0].modules()]
        assert {True, False} == {*self.modes}

    def on_evaluate_start(self, context: Any) -> None:
        self.events.append("start")

    def on_evaluate_end(self, context: Any, results: Any) -> None:
        self.events.append(sorted(results))

    def on_train_end(self, context: Any) -> None:
        assert [module.training for module in context.model[0].modules()] == self.modes
        self.events.append(("end", dict(context.validation), type(context.exception).__name__))


def saving_run(directory: Path, **sections: Any) -> ConfigContainer:
    config = own_run(directory, **sections)
    config.checkpoint.save_at_end = True
    return config


def resumed(config: ConfigContainer) -> ConfigContainer:
    """The same run, continued without a limit."""
    config.checkpoint.resume = True
    config.train.time_limit_minutes = None
    return config


def test_a_run_whose_time_is_over_ends_after_the_step_and_can_be_continued(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def limited() -> Any:
        config = saving_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.train.time_limit_minutes = AT_ONCE
        listener = Listener()
        result = pretrain(config, token_step, [listener])
        return result.reason, result.step, dict(result.validation), listener.events

    def rest() -> Any:
        config = resumed(saving_run(tmp_path / "run", dataset=OwnData(validation=8)))
        result = pretrain(config, token_step)
        return result.reason, result.step, list(result.validation)

    ended: Any = ("time limit", 1, {}, [("end", {}, "NoneType")])
    assert run_ranks(2, limited, timeout=120) == [ended] * 2
    assert "stopped by time limit at step 1/5\n" in capfd.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "step-0000001").is_dir()
    assert run_ranks(2, rest, timeout=120) == [("finished", 5, ["error"])] * 2
    wanted = plain_torch(own_run(tmp_path), pattern=2, steps=5)
    assert series(tmp_path / "run", "error") == pytest.approx(wanted.losses, rel=2e-6)


def test_an_evaluation_under_way_when_the_runs_time_is_over_is_discarded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def configured() -> ConfigContainer:
        config = saving_run(tmp_path / "run", dataset=NamedData(), model=OwnModel())
        config.validation = ValidationConfig(eval_at_start=True)
        return config

    def limited() -> Any:
        config = configured()
        config.train.time_limit_minutes = AT_ONCE
        # The run ends first, whatever an evaluation may take.
        config.validation.time_limit_minutes = AT_ONCE
        listener = Listener()
        result = pretrain(config, token_step, [listener])
        return result.reason, result.step, dict(result.validation), listener.events

    def rest() -> Any:
        result = pretrain(resumed(configured()), token_step)
        return result.reason, result.step

    ended: Any = ("time limit", 0, {}, ["start", [], ("end", {}, "NoneType")])
    assert run_ranks(2, limited, timeout=120) == [ended] * 2
    assert rows(tmp_path / "run") == []
    expected = (
        "validation at step 0 was cut short by time limit after 8 of 24 samples of "
        "validation/wiki, 0 of 16 samples of validation/code; its metrics are discarded\n"
    )
    assert expected in capfd.readouterr().out
    assert run_ranks(2, rest, timeout=120) == [("finished", 5)] * 2
    wanted = plain_torch(own_run(tmp_path), pattern=2, steps=5)
    assert series(tmp_path / "run", "error") == pytest.approx(wanted.losses, rel=2e-6)
    first = series(tmp_path / "run", "validation/wiki/error")[0]
    assert first == pytest.approx(error_of(7, FIRST["wiki"], 24), rel=1e-6)


def interrupted_in_evaluation(at_step: int) -> Callable[..., Any]:
    """A step in which rank 1 gets a signal, in the second global batch of an evaluation."""
    seen: list[int] = []

    def step(state: Any, data_iterator: Iterator[Any], model: Any) -> Any:
        if state.train_state.step == at_step and not model.training and dist.get_rank() == 1:
            seen.append(1)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return token_step(data_iterator, model)

    return step


@pytest.mark.parametrize("at_step", [2, 5])
def test_a_signal_in_an_evaluation_ends_it_and_the_run(tmp_path: Path, at_step: int) -> None:
    """In one between steps, and in the last one, after training."""

    def configured() -> ConfigContainer:
        config = saving_run(tmp_path / "run", dataset=OwnData(validation=24, test=8))
        config.validation = ValidationConfig(eval_interval=2)
        return config

    def interrupted() -> Any:
        listener = Listener()
        result = pretrain(configured(), interrupted_in_evaluation(at_step), [listener])
        return result.reason, result.step, listener.events

    def rest() -> Any:
        result = pretrain(resumed(configured()), token_step)
        return result.reason, result.step

    earlier = ["start", ["error"]] * ((at_step - 1) // 2)
    ended: Any = ("SIGTERM", at_step, [*earlier, "start", [], ("end", {}, "NoneType")])
    assert run_ranks(2, interrupted, timeout=120) == [ended] * 2
    evaluated_at = [row["step"] for row in rows(tmp_path / "run") if "validation/error" in row]
    assert evaluated_at == [step for step in (2, 4) if step < at_step]
    assert run_ranks(2, rest, timeout=120) == [("finished", 5)] * 2
    assert len(series(tmp_path / "run", "test/error")) == 1
    assert [row["step"] for row in rows(tmp_path / "run") if "error" in row] == [1, 2, 3, 4, 5]


def test_an_evaluation_has_the_metrics_of_what_it_saw_in_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=24), model=OwnModel())
        config.validation = ValidationConfig(
            eval_at_start=True, eval_interval=2, time_limit_minutes=AT_ONCE
        )
        listener = Listener()
        result = pretrain(config, token_step, [listener])
        return result.reason, len(listener.events), listener.events[:2], listener.events[-1][1]

    one, other = run_ranks(2, body, timeout=120)
    assert one == other
    assert one[:3] == ("finished", 9, ["start", ["error"]])
    assert list(one[3]) == ["error"]
    wanted = plain_torch(own_run(tmp_path), pattern=2, steps=5)
    assert series(tmp_path / "run", "error") == pytest.approx(wanted.losses, rel=2e-6)
    found = series(tmp_path / "run", "validation/error")
    assert found[0] == pytest.approx(error_of(7, FIRST["wiki"], 8), rel=1e-6)
    assert len(found) == 4
    expected = (
        "validation at step 0 was cut short by validation.time_limit_minutes after 8 of 24 samples "
        "of validation\n"
    )
    assert expected in capfd.readouterr().out


@pytest.mark.parametrize(
    ("wiki", "evaluated_sets"), [(16, ["wiki/error"]), (8, ["code/error", "wiki/error"])]
)
def test_sets_that_an_evaluation_has_no_time_for_have_no_metrics(
    tmp_path: Path, wiki: int, evaluated_sets: list[str]
) -> None:
    """After a complete evaluation no rank checks the time."""

    def body() -> Any:
        data = NamedData(validation={"wiki": wiki, "code": 16})
        config = own_run(tmp_path / "run", dataset=data)
        config.validation = ValidationConfig(eval_at_start=True, time_limit_minutes=AT_ONCE)
        config.train.train_iters = 1
        return sorted(pretrain(config, token_step).validation)

    assert run_ranks(1, body, timeout=120) == [evaluated_sets]
    for name in ("wiki", "code"):
        found = series(tmp_path / "run", f"validation/{name}/error")
        assert bool(found) == (f"{name}/error" in evaluated_sets)
        if found:
            assert found[0] == pytest.approx(error_of(7, FIRST[name], 8), rel=1e-6)


def test_all_ranks_end_an_evaluation_when_one_has_to(tmp_path: Path) -> None:
    def body() -> Any:
        asked: list[int] = []

        def stop() -> bool:
            asked.append(1)
            return dist.get_rank() == 1 and len(asked) == 2

        config = own_run(tmp_path / "run", dataset=OwnData(validation=27))
        with a_run(config, token_step) as run:
            cut = evaluated(run, stop=stop, control_group=run.parts.ranks.control_group)
            whole = evaluated(run, stop=lambda: len(asked) > 9)
            return (
                (cut.samples, cut.planned_samples, cut.complete, cut.tokens),
                cut.metrics["error"],
                (whole.samples, whole.complete),
                run.parts.state.train_state.consumed_validation_samples,
                len(asked),
            )

    for counts, error, whole, consumed, asked in run_ranks(2, body, timeout=120):
        assert counts == (16, 27, False, tokens_of(FIRST["wiki"], 16))
        assert error == pytest.approx(error_of(7, FIRST["wiki"], 16), rel=1e-6)
        assert whole == (27, True)
        assert consumed == 16 + 27
        assert asked == 2


def test_after_the_last_batch_no_rank_is_asked_to_stop(tmp_path: Path) -> None:
    def body() -> Any:
        with a_run(own_run(tmp_path / "run", dataset=OwnData(validation=8)), token_step) as run:
            result = evaluated(run, stop=lambda: True)
            return result.samples, result.complete

    assert run_ranks(2, body, timeout=120) == [(8, True)] * 2


def test_megatron_cores_timers_measure_steps_and_no_evaluation(tmp_path: Path) -> None:
    def body() -> Any:
        seen = set()

        def step(data_iterator: Iterator[Any], model: Any) -> Any:
            seen.add((model.training, get_model_config(model).timers is None))
            return token_step(data_iterator, model)

        config = own_run(tmp_path / "run", dataset=OwnData(validation=24))
        config.logger = LoggerConfig(log_interval=1, tensorboard=False, timing_log_level=1)
        config.validation = ValidationConfig(eval_interval=1, time_limit_minutes=AT_ONCE)
        pretrain(config, step)
        return sorted(seen)

    assert run_ranks(1, body, timeout=120) == [[(False, True), (True, False)]]
    assert len(series(tmp_path / "run", "forward-backward-time")) == 5


def test_the_command_ends_well_at_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    own_recipe.install(tmp_path / "site", monkeypatch)
    ended = run_command(
        *("pretrain", "sine", "--run-dir", "R", "dataset.seconds_per_sample=0.05"),
        *("train.train_iters=4000", "train.time_limit_minutes=0.03"),
        folder=tmp_path,
    )
    assert (ended.code, ended.err) == (0, "")
    lines = (tmp_path / "R" / "metrics.jsonl").read_text().splitlines()
    step = json.loads(lines[-1])["step"]
    assert f"stopped by time limit at step {step}/4000" in ended.out
    assert (tmp_path / "R" / "checkpoints" / "latest").read_text() == f"step-{step:07d}\n"

    resumed = run_command(
        *("pretrain", "sine", "--run-dir", "R", "--resume", f"train.train_iters={step + 2}"),
        "train.time_limit_minutes=null",
        folder=tmp_path,
    )
    assert resumed.code == 0
    assert f"finished at step {step + 2}/{step + 2}" in resumed.out
