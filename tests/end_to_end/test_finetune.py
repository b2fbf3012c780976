"""A run is fine-tuned through the command: on its own model, to a lower loss, resumed exactly."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from commands import run, start
from gpt_data import write_story
from gpt_tiny_runs import SMALL, trajectory
from sft_data import write_rows


def questions(numbers: range) -> list[dict[str, Any]]:
    return [{"prompt": f"next({n % 50}) = ", "completion": f"{n % 50 + 1}"} for n in numbers]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a run of gpt-tiny, which has overrides, and rows to fine-tune it on."""
    text = write_story(tmp_path / "story.txt", paragraphs=100)
    overrides = (*SMALL, "model.num_layers=2", "train.train_iters=4", f"dataset.path={text}")
    ended = run("pretrain", "gpt-tiny", *overrides, "--run-dir", "B", folder=tmp_path)
    assert ended.code == 0, ended.err
    write_rows(tmp_path / "rows" / "training.jsonl", questions(range(200)))
    write_rows(tmp_path / "rows" / "validation.jsonl", questions(range(7, 15)))
    return tmp_path


TUNE = (
    "dataset.path=rows",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "logger.log_interval=1",
    "logger.tensorboard=false",
)


def test_a_run_with_overrides_is_fine_tuned_packed_killed_and_resumed(base: Path) -> None:
    overrides = ("dataset.packing=true", "train.train_iters=40", "validation.eval_at_start=true")
    arguments = ("finetune", "gpt-tiny-sft", "--from", "B", *TUNE, *overrides)
    whole = run(*arguments, "--run-dir", "W", folder=base)
    assert whole.code == 0, whole.err
    assert whole.err == ""
    assert "% of train tokens count in the loss" in whole.out
    rows = [json.loads(line) for line in (base / "W" / "metrics.jsonl").read_text().splitlines()]
    found = [row["validation/lm loss"] for row in rows if "validation/lm loss" in row]
    assert found[-1] < 0.8 * found[0]
    # The recipe's own model has four layers of 128.
    config = (base / "W" / "config.yaml").read_text()
    assert "num_layers: 2" in config
    assert "hidden_size: 32" in config

    cut = start(*arguments, "checkpoint.save_interval=10", "--run-dir", "C", folder=base)
    cut.wait_for(base / "C" / "metrics.jsonl", 16)
    cut.send(signal.SIGKILL)
    assert cut.wait().code == -signal.SIGKILL
    # The checkpoint that a run started from is no longer needed.
    os.rename(base / "B", base / "gone")
    again = run("finetune", "gpt-tiny-sft", "--run-dir", "C", "--resume", folder=base)
    assert again.code == 0, again.err
    assert "continues after step" in again.out
    assert trajectory(base / "C") == trajectory(base / "W")


def test_mistakes_are_rejected_before_anything_is_made(base: Path) -> None:
    def rejected(*arguments: str) -> str:
        ended = run("finetune", "gpt-tiny-sft", *TUNE, *arguments, folder=base)
        assert ended.code == 2
        assert not (base / "R").exists()
        return ended.err

    text = rejected("--from", "B", "model.num_layers=3", "model.hidden_size=64", "--run-dir", "R")
    assert "model.num_layers: the checkpoint" in text
    assert "model.hidden_size: the checkpoint" in text
    assert "'nowhere' does not exist" in rejected("--from", "nowhere", "--run-dir", "R")
    with (base / "rows" / "training.jsonl").open("a") as file:
        file.write('{"prompt": "x"}\n')
    assert "training.jsonl, line 201: no 'completion'" in rejected("--from", "B", "--run-dir", "R")
    longer = run(
        "finetune", "gpt-tiny-sft", *TUNE, "--from", "B", "model.seq_length=64", "--dry-run",
        folder=base,
    )  # fmt: skip
    assert longer.code == 0, longer.err


def test_a_batch_is_shown_token_by_token(base: Path) -> None:
    shown = run("show-batch", "gpt-tiny-sft", *TUNE, "model.seq_length=32", folder=base)
    assert shown.code == 0, shown.err
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert lines[0].startswith("sample 1: ")
    assert lines[1].split() == ["position", "id", "token", "label", "predicts", "mask"]
    rows = [line.split() for line in lines[2:] if line]
    assert rows[0][:3] == ["0", str(ord("n")), "'n'"]
    assert rows[0][-1] == "0"
    counted = [row[-2] for row in rows if row[-1] == "1"]
    assert counted[-1] == "end"
    assert all(text.strip("'").isdigit() for text in counted[:-1])
    packed = run(
        "show-batch", "gpt-tiny-sft", *TUNE, "dataset.packing=true", "--samples", "2", folder=base
    )
    assert "packed documents" in packed.out
    assert "sample 2: " in packed.out
    text = run("show-batch", "gpt-tiny", *SMALL, f"dataset.path={base / 'story.txt'}", folder=base)
    assert "32 count in the loss (100.0 %)" in text.out
