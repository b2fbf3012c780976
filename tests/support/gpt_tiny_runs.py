"""Runs of gpt-tiny that take a second or two, and the files that they leave."""

import json
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.seq_length=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "validation.eval_iters=0",
    "logger.log_interval=1",
    "logger.tensorboard=false",
)


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's logged steps."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "lm loss" in row]


def trajectory(run: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every logged step."""
    return [(row["step"], row["lm loss"], row["grad_norm"]) for row in logged_steps(run)]


def losses(run: Path) -> list[float]:
    """Return the losses of a run, after checking that no step is missing or logged twice."""
    found = logged_steps(run)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["lm loss"] for row in found]


def assert_close(actual: list[float], expected: list[float]) -> None:
    """Compare the losses of the same run under two layouts."""
    assert actual == pytest.approx(expected, rel=1e-4, abs=0)


def contents(place: Path) -> dict[str, bytes]:
    """Return every file below a directory with its bytes."""
    files = [path for path in place.rglob("*") if path.is_file()]
    return {str(path.relative_to(place)): path.read_bytes() for path in files}
