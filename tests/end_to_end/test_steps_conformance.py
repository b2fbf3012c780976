"""Every feature of the loop, with the GPT step and with the multimodal step, colocated or separate.

Each kind trains four times on two ranks: to the end, with all callbacks and loggers; until it is
killed; from there to the end; and runs that end early.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, override

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from bridge.training import gpt_step, mimo_step
from bridge.training.callbacks import Callback, CallbackContext
from bridge.training.config import ConfigContainer, TrainConfig
from bridge.training.model.ddp import ddp_parts
from bridge.training.pretrain import TrainResult, pretrain
from gpt_models import tiny_gpt
from mimo_layout_runs import MIXED, Chosen
from mimo_models import mimo_run, tiny_mimo
from ranks import RankFailure, run_ranks
from training_runs import TokenData, Weights, gpt_run, rows
from wandb_files import history, read_wandb

RANKS, STEPS = 2, 6


@dataclass(frozen=True)
class Kind:
    """A model with its data, and its forward step."""

    name: str
    make: Callable[[Path], ConfigContainer]
    step: Callable[..., Any]

    def run(self, directory: Path, steps: int = STEPS, **train: Any) -> ConfigContainer:
        """Return a run of `STEPS` steps that is evaluated every third and saved every second."""
        config = self.make(directory)
        sizes = {"global_batch_size": 8, "micro_batch_size": 2}
        config.train = TrainConfig(train_iters=steps, **(sizes | train))
        config.scheduler.lr_decay_iters = STEPS
        config.validation.eval_interval = 3
        config.checkpoint.save_interval = 2
        config.checkpoint.keep_last = 0
        return config


def gpt(directory: Path) -> ConfigContainer:
    return gpt_run(directory, tiny_gpt(), dataset=TokenData(validation=8))


def mimo(placement: Literal["colocated", "separate"]) -> Callable[[Path], ConfigContainer]:
    return lambda directory: mimo_run(
        directory, tiny_mimo(placement=placement), dataset=Chosen(MIXED, validation=8)
    )


KINDS = [
    Kind("gpt", gpt, gpt_step.forward_step),
    Kind("colocated", mimo("colocated"), mimo_step.forward_step),
    Kind("separate", mimo("separate"), mimo_step.forward_step),
]


@dataclass
class Listener(Callback):
    """A callback that records events and collects other data than losses."""

    events: list[str] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    collected: list[int] = field(default_factory=list)
    kill_at: int | None = None
    stop_at: int | None = None
    interrupt_at: int | None = None

    @override
    def on_train_start(self, context: CallbackContext) -> None:
        self.events.append("start")

    @override
    def on_step_start(self, context: CallbackContext) -> None:
        step = context.state.train_state.step
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.stop_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == self.interrupt_at:  # As a terminal does it, every process of the group.
            os.kill(os.getpid(), signal.SIGINT)

    @override
    def on_before_optimizer_step(self, context: CallbackContext) -> None:
        squares = [
            float((weight.main_grad**2).sum())
            for part in ddp_parts(context.model)
            for weight in part.parameters()
        ]
        self.norms.append(sum(squares))

    @override
    def on_evaluate_end(self, context: CallbackContext, results: dict[str, float | None]) -> None:
        self.events.append(f"evaluated {context.state.train_state.step}")
        self.collected.append(len(context.collect_non_loss_data()))
        results["mine"] = 1.5

    @override
    def on_log(self, context: CallbackContext, metrics: dict[str, float | None]) -> None:
        metrics["extra"] = float(context.state.train_state.step)

    @override
    def on_checkpoint_save(self, context: CallbackContext, path: Path) -> None:
        self.events.append(f"saved {path.name}")

    @override
    def on_train_end(self, context: CallbackContext) -> None:
        self.events.append("end")


@dataclass(kw_only=True)
class Found:
    """The results of all runs of a kind on one rank."""

    result: TrainResult
    weights: dict[str, torch.Tensor]
    listener: Listener
    continued: dict[str, torch.Tensor]
    stopped: TrainResult
    interrupted: TrainResult
    resumed_after_stops: TrainResult
    message: str
    skipped: TrainResult


@dataclass(kw_only=True)
class Runs:
    """The runs of a kind: the results of each rank, and the files."""

    ranks: list[Found]
    place: Path


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=pytest.mark.xdist_group(k.name), id=k.name) for k in KINDS],
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    kind: Kind = request.param
    place = tmp_path_factory.mktemp(kind.name)
    with pytest.raises(RankFailure, match="died without a report"):
        run_ranks(RANKS, killed, kind, place, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        found = run_ranks(RANKS, all_runs, kind, place, timeout=110)
    return Runs(ranks=found, place=place)


def killed(kind: Kind, place: Path) -> None:
    pretrain(kind.run(place / "killed"), kind.step, [Listener(kill_at=5)])


def all_runs(kind: Kind, place: Path) -> Found:
    listener = Listener()
    config = kind.run(place / "whole")
    config.logger.tensorboard, config.logger.wandb_project = True, "conformance"
    result, weights = trained_with(config, kind, listener)
    config = kind.run(place / "killed")
    config.checkpoint.resume = True
    _, continued = trained_with(config, kind, Listener())
    stopped = pretrain(kind.run(place / "stopped"), kind.step, [Listener(stop_at=2)])
    config = kind.run(place / "stopped")
    config.checkpoint.resume = True
    interrupted = pretrain(config, kind.step, [Listener(interrupt_at=4)])
    resumed = pretrain(config, kind.step)
    message = ""
    try:
        pretrain(kind.run(place / "raise", nan_action="raise"), broken(kind.step))
    except FloatingPointError as error:
        message = str(error)
    skipped = pretrain(kind.run(place / "skip", nan_action="skip"), broken(kind.step))
    return Found(
        result=result,
        weights=weights,
        listener=listener,
        continued=continued,
        stopped=stopped,
        interrupted=interrupted,
        resumed_after_stops=resumed,
        message=message,
        skipped=skipped,
    )


def trained_with(
    config: ConfigContainer, kind: Kind, listener: Listener
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    weights = Weights()
    result = pretrain(config, kind.step, [listener, weights])
    return result, weights.parameters


def broken(step: Callable[..., Any]) -> Callable[..., Any]:
    """Make a step whose losses are NaN in the third training step."""

    def broken_step(state: Any, data_iterator: Any, model: Any) -> Any:
        output, loss_function = step(state, data_iterator, model)
        if loss_function is None or state.train_state.step != 2 or not torch.is_grad_enabled():
            return output, loss_function

        def broken_loss(output: torch.Tensor) -> Any:
            loss, *rest = loss_function(output)
            return (loss * float("nan"), *rest)

        return output, broken_loss

    return broken_step


def losses_of(runs: Runs) -> dict[int, float]:
    """Return the losses of the uninterrupted run, by step."""
    return {row["step"]: row["lm loss"] for row in rows(runs.place / "whole") if "lm loss" in row}


def test_callbacks_hear_everything_on_every_rank(runs: Runs) -> None:
    expected = [
        "start",
        "saved step-0000002",
        "evaluated 3",
        "saved step-0000004",
        "evaluated 6",
        "saved step-0000006",
        "end",
    ]
    for found in runs.ranks:
        assert found.listener.events == expected
        assert len(found.listener.norms) == STEPS
        assert all(norm > 0 for norm in found.listener.norms)


def test_data_that_is_no_loss_is_collected_where_the_model_ends(runs: Runs) -> None:
    collected = [found.listener.collected for found in runs.ranks]
    separate = "separate" in runs.place.name
    assert collected == ([[0, 0], [4, 4]] if separate else [[2, 2], [2, 2]])


def test_ranks_agree_on_metrics_and_validation(runs: Runs) -> None:
    first, second = runs.ranks
    assert first.result.validation == second.result.validation
    assert first.result.validation["mine"] == 1.5
    assert first.result.metrics["lm loss"] == second.result.metrics["lm loss"]
    assert first.result.consumed_samples == STEPS * 8


def test_rows_have_losses_rates_norms_and_throughput(runs: Runs) -> None:
    steps = [row for row in rows(runs.place / "whole") if "lm loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for row in steps:
        assert row["grad_norm"] > 0
        assert row["tokens_per_s"] == pytest.approx(
            row["samples_per_s"] * row["consumed_tokens"] / row["consumed_samples"]
        )
        assert row["extra"] == row["step"]
        if not runs.place.name.startswith("gpt"):
            # A step reads one half of the samples, the next the other.
            images = sum(MIXED[:8] if row["step"] % 2 else MIXED[8:])
            assert row["images_per_s"] * row["step_time_s"] == pytest.approx(images)
    validated = [row["step"] for row in rows(runs.place / "whole") if "validation/lm loss" in row]
    assert validated == [3, 6]


def test_tensorboard_has_the_same_numbers(runs: Runs) -> None:
    events = EventAccumulator(str(runs.place / "whole" / "tensorboard"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("lm loss")}
    assert curve == pytest.approx(losses_of(runs), rel=1e-6)


def test_wandb_has_the_same_numbers(runs: Runs) -> None:
    [records] = read_wandb(runs.place / "whole")
    logged = {row["step"]: row["lm loss"] for row in history(records) if "lm loss" in row}
    assert logged == losses_of(runs)


def test_a_killed_run_continues_bit_for_bit(runs: Runs) -> None:
    def comparable(name: str) -> list[dict[str, Any]]:
        left_out = ("step_time_s", "tokens_per_s", "samples_per_s", "images_per_s")
        return [
            {key: value for key, value in row.items() if key not in left_out}
            for row in rows(runs.place / name)
        ]

    assert comparable("killed") == comparable("whole")
    for found in runs.ranks:
        assert found.weights.keys() == found.continued.keys()
        for name, weight in found.weights.items():
            assert torch.equal(found.continued[name], weight), name


def test_a_signal_stops_all_ranks_with_a_checkpoint(runs: Runs) -> None:
    for found in runs.ranks:
        assert (found.stopped.reason, found.stopped.step) == ("SIGTERM", 3)
        assert (found.interrupted.reason, found.interrupted.step) == ("SIGINT", 5)
        assert (found.resumed_after_stops.reason, found.resumed_after_stops.step) == ("finished", 6)
        assert found.resumed_after_stops.metrics["lm loss"] == found.result.metrics["lm loss"]


def test_a_nan_is_an_error_on_every_rank_or_a_skipped_step(runs: Runs) -> None:
    for found in runs.ranks:
        assert "nan at step 3, microbatch 0" in found.message
        assert found.skipped.reason == "finished"
    skipped = [row["skipped_steps"] for row in rows(runs.place / "skip") if "lm loss" in row]
    assert skipped == [0, 0, 1, 0, 0, 0]
