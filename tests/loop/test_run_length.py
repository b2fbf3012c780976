"""The end and the learning rate of a run that is continued with another batch size or length."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bridge.training.config import ConfigContainer, TrainConfig
from bridge.training.data.run_length import last_step, samples_to_draw, schedule_samples
from bridge.training.pretrain import pretrain
from bridge.training.state import TrainState
from bridge.training.usage_error import UsageError
from ranks import run_ranks
from training_runs import Killed, Killer, own_run, rows, token_step


@pytest.mark.parametrize(
    ("length", "batch", "done", "expected"),
    [
        # Last step, samples to draw, samples of the schedule.
        ({"train_iters": 10}, 16, (0, 0), (10, 160, 160)),
        ({"train_iters": 10}, 8, (5, 80), (10, 120, 80)),
        ({"train_iters": 10}, 8, (10, 160), (10, 160, 80)),
        ({"train_samples": 160}, 16, (0, 0), (10, 160, 160)),
        ({"train_samples": 160}, 8, (5, 80), (15, 160, 160)),
        ({"train_samples": 160}, 16, (10, 160), (10, 160, 160)),
        ({"epochs": 2}, 16, (0, 0), (12, None, 192)),
        ({"epochs": 2}, 8, (5, 80), (20, None, 200)),
        ({"epochs": 2}, 16, (12, 192), (12, None, 192)),
        ({"epochs": 2}, 8, (12, 192), (13, None, 200)),
    ],
)
def test_the_end_counts_what_is_done_already(
    length: Mapping[str, Any],
    batch: int,
    done: tuple[int, int],
    expected: tuple[int, int | None, int],
) -> None:
    train = TrainConfig(**length, global_batch_size=batch, micro_batch_size=1)
    state = TrainState(step=done[0], consumed_train_samples=done[1])
    assert expected == (
        last_step(train, 100, state),
        samples_to_draw(train, state),
        schedule_samples(train, 100, state),
    )


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"train_iters": 4}, "train.train_iters=4: .* 5 steps already; give at least 5"),
        ({"train_samples": 64}, "train.train_samples=64: .* 80 samples already; give at least 80"),
        ({"train_samples": 88}, "train.global_batch_size=16: 8 of train.train_samples=88 are left"),
        ({"epochs": 1}, "train.epochs=1: 1 passes over 70 samples are less than the 80 samples"),
    ],
)
def test_an_end_that_is_passed_or_missed_is_rejected(
    length: Mapping[str, Any], message: str
) -> None:
    train = TrainConfig(**length, global_batch_size=16, micro_batch_size=1)
    state = TrainState(step=5, consumed_train_samples=80)
    with pytest.raises(UsageError, match=message):
        last_step(train, 70, state)


def run_of(directory: Path, length: Mapping[str, Any], **train: Any) -> ConfigContainer:
    config = own_run(directory)
    config.train = TrainConfig(**{"global_batch_size": 8, "micro_batch_size": 2, **length, **train})
    config.checkpoint.save_interval = 2
    return config


@pytest.mark.parametrize(
    ("length", "changed", "samples", "jumps"),
    [
        # At step 3, of 8 samples each before; the warm-up is 0.4 of the run.
        ({"train_samples": 48}, {"global_batch_size": 4}, 48, False),
        # 40 samples are left, and 56 is no multiple of 10.
        ({"train_samples": 56}, {"global_batch_size": 10}, 56, False),
        ({"epochs": 2}, {"global_batch_size": 4}, 48, False),
        ({"train_iters": 5}, {"global_batch_size": 4}, 28, False),
        ({"train_iters": 5}, {"global_batch_size": 16}, 64, False),
        ({"train_iters": 5}, {"train_iters": 7}, 56, True),
    ],
)
def test_a_continued_run_ends_where_it_should_and_its_rate_does_not_jump_unsaid(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    length: Mapping[str, Any],
    changed: Mapping[str, Any],
    samples: int,
    jumps: bool,
) -> None:
    def whole_and_cut() -> int:
        pretrain(run_of(tmp_path / "whole", length), token_step)
        with pytest.raises(Killed):
            pretrain(run_of(tmp_path / "cut", length), token_step, [Killer(3)])
        config = run_of(tmp_path / "cut", {"train_iters": 1})
        config.checkpoint.resume = True
        with pytest.raises(UsageError, match="train.train_iters=1: the run has taken 2 steps"):
            pretrain(config, token_step)
        config.train = run_of(tmp_path / "cut", {**length, **changed}).train
        return pretrain(config, token_step).consumed_samples

    assert run_ranks(1, whole_and_cut, timeout=120) == [samples]
    rates = [[row["learning_rate"] for row in rows(tmp_path / name)] for name in ("whole", "cut")]
    printed = re.findall(
        r"warning: the learning rate of step 3 is (\S+), and was to be (\S+) when",
        capfd.readouterr().out,
    )
    if jumps:
        assert printed == [(f"{rates[1][2]:.6g}", f"{rates[0][2]:.6g}")]
        assert rates[1][2] != rates[0][2]
    else:
        assert printed == []
        assert rates[1][2] == pytest.approx(rates[0][2], rel=1e-6)
    # The rate after the last step would be the lowest.
    assert rates[1][-1] < 0.02
