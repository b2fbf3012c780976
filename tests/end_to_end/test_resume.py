"""A run that is interrupted and continued equals the uninterrupted one."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from commands import Command, Ended, run, start
from gpt_tiny_runs import SMALL, contents, logged_steps, trajectory

# Steps that last long enough for a test to kill the run between them.
LONGER = ("model.hidden_size=64", "model.seq_length=128")
STEPS = 12


def begin(folder: Path, *overrides: str, ranks: int = 1) -> Command:
    arguments = (*SMALL, *LONGER, f"train.train_iters={STEPS}", *overrides)
    return start(
        "pretrain", "gpt-tiny", *arguments, "--run-dir", "R", "--nproc", str(ranks), folder=folder
    )


def resume(folder: Path, *overrides: str, ranks: int = 1) -> Ended:
    arguments = ("--run-dir", "R", "--resume", "--nproc", str(ranks))
    return run("pretrain", "gpt-tiny", *arguments, *overrides, folder=folder)


def kill_at(command: Command, step: int) -> None:
    """Kill the command and all that it has started when it has logged `step`."""
    command.wait_for(command.folder / "R" / "metrics.jsonl", step)
    for pid in [command.pid, *command.descendants()]:
        os.kill(pid, signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL


def test_twelve_steps_equal_twelve_steps_killed_in_the_middle_bit_for_bit(tmp_path: Path) -> None:
    ranks = 2
    uninterrupted = begin(tmp_path / "whole", ranks=ranks)
    assert uninterrupted.wait().code == 0
    expected = trajectory(tmp_path / "whole" / "R")
    assert len(expected) == STEPS

    cut = tmp_path / "cut"
    kill_at(begin(cut, "checkpoint.save_interval=3", ranks=ranks), step=7)
    with (cut / "R" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "consumed_sam')  # as a crash may leave it
    ended = resume(cut, ranks=ranks)
    assert ended.code == 0, ended.err
    assert "continues after step" in ended.out
    assert ended.err == ""
    assert trajectory(cut / "R") == expected


def test_a_run_without_a_checkpoint_starts_again_and_says_so(tmp_path: Path) -> None:
    kill_at(begin(tmp_path), step=3)
    ended = resume(tmp_path, "train.train_iters=4")
    assert ended.code == 0, ended.err
    assert "the run has no checkpoint yet: it starts again at step 0" in ended.out
    assert [step for step, *_ in trajectory(tmp_path / "R")] == [1, 2, 3, 4]


def test_a_run_can_be_extended_and_not_be_made_another(tmp_path: Path) -> None:
    rates = ("optimizer.lr=0.003", "optimizer.min_lr=0.0003")
    assert begin(tmp_path, "train.train_iters=3", *rates).wait().code == 0
    before = contents(tmp_path / "R")
    for overrides, named in (
        (["model.hidden_size=32", "rng.seed=7"], ["model.hidden_size", "rng.seed"]),
        (["dataset.split=50,50,0"], ["dataset.split"]),
        (["dataset.mock=true", "dataset.standard_library=false"], ["dataset.mock"]),
    ):
        rejected = resume(tmp_path, *overrides)
        assert rejected.code == 2
        for name in named:
            assert re.search(rf"{name}=\S+: the run was started with", rejected.err)
        assert "Traceback" not in rejected.err
    other = run("pretrain", "gpt-125m", "--run-dir", "R", "--resume", folder=tmp_path)
    assert other.code == 2
    assert "gpt-tiny" in other.err
    shorter = resume(tmp_path, "train.train_iters=2", "--dry-run")
    assert shorter.code == 2
    assert "train.train_iters=2: the run has taken 3 steps already" in shorter.err
    assert contents(tmp_path / "R") == before

    extended = resume(tmp_path, "train.train_iters=5", "optimizer.lr=0.001")
    assert extended.code == 0, extended.err
    assert "continues after step 3" in extended.out
    assert re.search(
        "warning: the learning rate of step 4 is .*, and was to be 0.0003", extended.out
    )
    continued = logged_steps(tmp_path / "R")
    assert [row["step"] for row in continued] == [1, 2, 3, 4, 5]
    assert max(row["learning_rate"] for row in continued[:3]) == 0.003
    assert all(0.0003 < row["learning_rate"] <= 0.001 for row in continued[3:])


def test_a_run_continues_with_fewer_ranks_than_its_layout_had(tmp_path: Path) -> None:
    split = "model.tensor_model_parallel_size=2"
    assert begin(tmp_path, "train.train_iters=2", split, ranks=2).wait().code == 0
    rejected = resume(tmp_path, "train.train_iters=3")
    assert rejected.code == 2
    assert "1 ranks are not a multiple of model.tensor_model_parallel_size=2" in rejected.err
    ended = resume(tmp_path, "train.train_iters=3", "model.tensor_model_parallel_size=1")
    assert ended.code == 0, ended.err
    assert [row["step"] for row in logged_steps(tmp_path / "R")] == [1, 2, 3]
    other = resume(tmp_path, "model.tensor_model_parallel_size=1", "rng.seed=7")
    assert other.code == 2
    assert re.search(r"rng\.seed=\S+: the run was started with", other.err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run R that has taken its 2 steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert begin(folder, "train.train_iters=2").wait().code == 0
    return folder


def test_a_finished_run_that_is_resumed_stays_as_it_is(finished: Path) -> None:
    before = (finished / "R" / "metrics.jsonl").read_bytes()
    ended = resume(finished)
    assert ended.code == 0, ended.err
    assert "finished at step 2/2" in ended.out
    assert (finished / "R" / "metrics.jsonl").read_bytes() == before


def test_a_missing_checkpoint_is_an_error_with_a_remedy(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "R", tmp_path / "R")
    (tmp_path / "R" / "checkpoints" / "latest").write_text("step-0000009\n")
    ended = resume(tmp_path, "train.train_iters=4")
    assert ended.code == 2
    assert "step-0000009" in ended.err
    assert "continue from one with --resume --step 2" in ended.err
    assert [step for step, *_ in trajectory(tmp_path / "R")] == [1, 2]
