"""Four ranks of the command train as one process does.

tests/loop_with_gpt/test_layouts_matrix.py has a sample of all layouts.
"""

from pathlib import Path

from commands import run
from gpt_tiny_runs import SMALL, assert_close, logged_steps

STEPS = 6


def train(folder: Path, *overrides: str, ranks: int = 1) -> dict[str, list[float]]:
    """Return the loss and the gradient norm of every step."""
    arguments = (*SMALL, f"train.train_iters={STEPS}", "checkpoint.save_at_end=false", *overrides)
    ended = run(
        "pretrain", "gpt-tiny", *arguments, "--run-dir", "R", "--nproc", str(ranks), folder=folder
    )
    assert ended.code == 0, ended.err
    assert ended.err == ""
    found = logged_steps(folder / "R")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    return {name: [row[name] for row in found] for name in ("lm loss", "grad_norm")}


def test_four_processes_train_as_one_does(tmp_path: Path) -> None:
    layout = ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")
    one = train(tmp_path / "one")
    four = train(tmp_path / "four", *layout, ranks=4)
    assert one["lm loss"][-1] < one["lm loss"][0] - 0.1
    for name, values in one.items():
        assert_close(four[name], values)
