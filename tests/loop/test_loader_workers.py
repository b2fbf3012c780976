"""Data loading processes end with their run, and one that is killed is named."""

import os
import pty
import signal
import time
from pathlib import Path

import psutil
import pytest

import own_recipe
from commands import Command, start

SLOW = ("dataset.seconds_per_sample=0.02", "train.train_iters=400", "train.num_workers=2")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a package of recipes installed and no launcher around."""
    return own_recipe.work_folder(tmp_path, monkeypatch)


def started(work: Path, output: int | None = None) -> tuple[Command, list[int]]:
    """Start a run with two workers; return it and them once it trains."""
    command = start("pretrain", "sine", *SLOW, "--run-dir", "R", folder=work, output=output)
    command.wait_for(work / "R" / "metrics.jsonl", 2)
    workers = sorted(command.descendants())
    assert len(workers) == 2
    return command, workers


def assert_gone(processes: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("by", "advice"),
    [
        (signal.SIGKILL, "memory runs out; lower train.num_workers=2"),
        (signal.SIGBUS, "shared memory is full; lower train.num_workers=2"),
    ],
)
def test_a_worker_that_is_killed_is_named_with_what_to_set(
    work: Path, by: signal.Signals, advice: str
) -> None:
    command, workers = started(work)
    os.kill(workers[1], by)
    ended = command.wait()
    assert ended.code == 1
    # torch writes a line of its own about SIGBUS, with a NUL at its end.
    named = f"data loading worker 2 of 2 (process {workers[1]}) was killed by {by.name}"
    said = [line for line in ended.err.splitlines() if "bridge: rank 0" in line]
    assert len(said) == 1
    assert f"WorkerDied: {named}: " in said[0]
    assert advice in said[0]
    assert_gone(workers, 1)


def test_workers_end_by_themselves_when_the_training_process_is_killed(work: Path) -> None:
    command, workers = started(work)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    assert_gone(workers, 15)


def test_a_run_whose_terminal_is_closed_saves(work: Path) -> None:
    terminal, output = pty.openpty()
    command, _ = started(work, output=output)
    os.close(output)
    # The kernel sends the signal to the processes in the foreground of a terminal that is closed.
    os.close(terminal)
    command.send(signal.SIGHUP, to_group=True)
    ended = command.wait()
    assert (ended.code, ended.err) == (128 + signal.SIGHUP, "")
    assert (work / "R" / "checkpoints" / "latest").exists()
