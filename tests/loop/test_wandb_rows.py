"""Rows in Weights & Biases of a run that is killed and continued."""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb

from bridge.training.metric_loggers import WandbLogger
from bridge.training.metric_loggers.wandb_history import written_rows
from bridge.training.pretrain import pretrain
from ranks import RankFailure, run_ranks
from training_runs import OwnData, own_run, rows, token_step
from wandb_files import history, read_wandb

# Imported here once, for all forks.
assert wandb.__version__


@dataclass(frozen=True)
class Kill:
    """A callback that kills the process at a fixed point of a step."""

    point: str
    step: int

    def on_step_start(self, context: Any) -> None:
        self._at("step", context)

    def on_evaluate_start(self, context: Any) -> None:
        self._at("evaluation", context)

    def _at(self, point: str, context: Any) -> None:
        if (point, context.state.train_state.step) == (self.point, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # Each fork has a W&B service of its own, as a new process has.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


@pytest.mark.filterwarnings("default")
def test_every_row_is_there_once_after_two_kills(tmp_path: Path) -> None:
    def start(*callbacks: object, resume: bool = True) -> None:
        config = own_run(tmp_path, dataset=OwnData(validation=8))
        config.train.train_iters, config.checkpoint.save_interval = 4, 2
        config.logger.wandb_project, config.checkpoint.resume = "unit", resume
        pretrain(config, token_step, callbacks)

    def killed(point: str, step: int, *, resume: bool = True) -> None:
        with pytest.raises(RankFailure, match="died without a report"):
            run_ranks(1, lambda: start(Kill(point, step), resume=resume))

    killed("step", 3, resume=False)  # Row 3 is written, and checkpoint 2.
    killed("evaluation", 4)  # The last checkpoint is saved, and nothing evaluated.
    run_ranks(1, start)

    first, second, third = (history(records) for records in read_wandb(tmp_path))
    assert [row["step"] for row in first] in ([1, 2], [1, 2, 3])
    assert [row["step"] for row in [*first, *second]] == [1, 2, 3, 4]
    assert [row["step"] for row in third] == [4]
    everything = [*first, *second, *third]
    assert [row["_step"] for row in everything] == [0, 1, 2, 3, 4]
    logged = rows(tmp_path)
    for ours, theirs in zip(logged, everything, strict=True):
        shared = {name: value for name, value in theirs.items() if not name.startswith("_")}
        if ours["step"] != 3:  # It was logged twice, with the same numbers at another speed.
            assert shared == ours
        assert (shared.keys(), shared.get("error")) == (ours.keys(), ours.get("error"))


@pytest.mark.filterwarnings("default")
def test_rows_of_any_size_are_found_in_a_torn_or_damaged_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def body() -> None:
        logger = WandbLogger(tmp_path, project="unit")
        for number in range(40):  # Most of them cross the border of two blocks of 32 KiB.
            text: Any = "a" * 3001 * (number % 12)
            logger.log({"x": 0.5, "text": text}, 10 * number)
        logger.close()

    run_ranks(1, body)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = written_rows(tmp_path / "wandb")
    assert [(row.number, row.step) for row in found] == [(n, 10 * n) for n in range(40)]
    assert all(row.names == {"x", "text"} for row in found)
    whole = file.read_bytes()
    # Other records than those of rows name the step too.
    for step in re.finditer(b"_step", whole):
        file.write_bytes(whole[: step.start()] + b"\0" + whole[step.start() + 1 :])
        if lost := set(found) - set(written_rows(tmp_path / "wandb")):
            break
    assert len(lost) == 1
    assert f"{file}: 1 of its records are damaged" in caplog.text
    file.write_bytes(whole[: len(whole) // 2])
    assert written_rows(tmp_path / "wandb") == found[: len(written_rows(tmp_path / "wandb"))]
    assert 10 < len(written_rows(tmp_path / "wandb")) < 30
