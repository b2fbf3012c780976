"""The command as a process of its own: its files and its output."""

import json
import subprocess
import sys
from pathlib import Path

from commands import run
from gpt_tiny_runs import SMALL, contents, losses

KEYS = {
    "step",
    "consumed_samples",
    "consumed_tokens",
    "lm loss",
    "learning_rate",
    "grad_norm",
    "skipped_steps",
    "step_time_s",
    "tokens_per_s",
    "samples_per_s",
}


def test_a_run_leaves_its_files_and_is_not_overwritten(tmp_path: Path) -> None:
    settings = (
        *SMALL,
        "train.train_iters=20",
        "logger.tensorboard=true",
        "validation.eval_iters=1",
    )
    ended = run("pretrain", "gpt-tiny", *settings, "--run-dir", "R", folder=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert "finished at step 20/20" in ended.out
    assert "nats/byte, bigram" in ended.out.splitlines()[-1]
    files = contents(tmp_path / "R")
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/latest"):
        assert name in files
    assert files["checkpoints/latest"] == b"step-0000020\n"
    assert any(name.startswith("tensorboard/events.") for name in files)
    assert any(name.startswith("checkpoints/step-0000020/") for name in files)

    lines = [json.loads(line) for line in files["metrics.jsonl"].decode().splitlines()]
    assert len(losses(tmp_path / "R")) == 20
    assert all(set(line) == KEYS for line in lines[:20])
    assert lines[19]["consumed_samples"] == 80
    assert lines[19]["consumed_tokens"] == 80 * 32
    assert [line for line in lines if "validation/lm loss" in line] == lines[20:]
    assert len(lines) > 20

    rejected = run("pretrain", "gpt-tiny", "--run-dir", "R", folder=tmp_path)
    assert rejected.code == 2
    assert "'R' holds a run already; continue it with --resume" in rejected.err
    assert contents(tmp_path / "R") == files


def test_two_ranks_say_nothing_of_their_machinery(tmp_path: Path) -> None:
    layout = ("--nproc", "2", "model.tensor_model_parallel_size=2")
    settings = (*SMALL, "train.train_iters=2", "checkpoint.save_interval=1", "--run-dir", "R")
    ended = run("pretrain", "gpt-tiny", *settings, *layout, folder=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert "2 ranks (tensor 2)" in ended.out


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom bridge.cli import main\n"
        "try:\n    main(['pretrain', '--help'])\n"
        "except SystemExit:\n    print(sorted({'torch', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout.splitlines()[-1] == "[]"


def test_a_large_layout_is_checked_without_its_weights(tmp_path: Path) -> None:
    large = ("llama3-8b", "--nproc", "32", "--dry-run", "dataset.mock=true")
    ended = run("pretrain", *large, folder=tmp_path)
    assert (ended.code, ended.out, ended.err) == (
        0,
        "dry run: llama3-8b is ready for 32 ranks\n",
        "",
    )
    wrong = run("pretrain", *large, "model.pipeline_model_parallel_size=5", folder=tmp_path)
    assert wrong.code == 2
    assert "pipeline_model_parallel_size" in wrong.err


def test_every_recipe_can_be_shown_and_fed_back(tmp_path: Path) -> None:
    for recipe in ("gpt-tiny", "gpt-125m", "llama3-1b", "llama3-8b"):
        mock = "dataset.mock=true" if recipe != "gpt-tiny" else "rng.seed=5"
        nproc = ("--nproc", "2" if recipe == "llama3-8b" else "1")
        for full in ([], ["--full"]):
            shown = run("show", recipe, mock, *full, *nproc, folder=tmp_path)
            assert (shown.code, shown.err) == (0, "")
            (tmp_path / "fed.yaml").write_text(shown.out)
            again = run("show", recipe, "--config", "fed.yaml", *full, *nproc, folder=tmp_path)
            assert again.out == shown.out, again.err


def test_four_mistakes_come_in_one_report_with_the_nearest_names(tmp_path: Path) -> None:
    wrong = (
        "train.train_itres=20",
        "modle.num_layers=2",
        "optimizer.weight_decy=0.1",
        "train.global_batch_size=big",
    )
    ended = run("pretrain", "gpt-tiny", *wrong, "--run-dir", "R", folder=tmp_path)
    assert ended.code == 2
    for line in (
        "train.train_itres: unknown key; did you mean train.train_iters?",
        "did you mean model.num_layers?",
        "optimizer.weight_decy: unknown key; did you mean optimizer.weight_decay?",
        "train.global_batch_size: expected an integer, got 'big'",
    ):
        assert line in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "R").exists()
