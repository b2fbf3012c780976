"""Adapters through the command: trained on top of a run's model, resumed, merged, exported."""

import contextlib
import io
import os
import shutil
from pathlib import Path

from bridge.cli import main
from gpt_data import write_story
from gpt_tiny_runs import SMALL, trajectory
from ranks import run_ranks
from sft_data import write_rows
from training_runs import series

TUNE = (
    "dataset.path=rows.jsonl",
    "dataset.validation_path=rows.jsonl",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.train_iters=16",
    "checkpoint.save_interval=8",
    "optimizer.lr=0.05",
    "logger.log_interval=1",
    "logger.tensorboard=false",
    "validation.eval_at_start=true",
)


def bridge(*arguments: str, code: int = 0) -> str:
    """Run a command in this process, for a tenth of the time; return what it wrote."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        ended = main(arguments)
    assert ended == code, written.getvalue()
    return written.getvalue()


def test_a_run_of_adapters_from_its_base_to_what_others_load(tmp_path: Path) -> None:
    def in_the_folder() -> None:
        os.chdir(tmp_path)
        commands(tmp_path)

    run_ranks(1, in_the_folder, process_group=False, timeout=100)


def commands(folder: Path) -> None:
    text = write_story(folder / "story.txt", paragraphs=100)
    small = (*SMALL, "model.num_layers=2", "train.train_iters=2", f"dataset.path={text}")
    bridge("pretrain", "gpt-tiny", *small, "--run-dir", "B")
    rows = [{"prompt": f"next({n % 50}) = ", "completion": f"{n % 50 + 1}"} for n in range(40)]
    write_rows(folder / "rows.jsonl", rows)

    wrong = ("finetune", "gpt-tiny-lora", "--from", "B", *TUNE, "--run-dir", "L")
    error = bridge(*wrong, "peft.target_modules=[linear_qkw]", code=2)
    assert "peft.target_modules: 'linear_qkw' matches no layer; did you mean 'linear_q" in error
    assert not (folder / "L").exists()

    out = bridge("finetune", "gpt-tiny-lora", "--from", "B", *TUNE, "--run-dir", "L")
    assert "lora adapts 8 layers" in out
    found = series(folder / "L", "validation/lm loss")
    assert found[-1] < 0.9 * found[0]

    # A stopped run continues, also when its base model has been moved.
    shutil.copytree(folder / "L", folder / "C")
    shutil.rmtree(folder / "C" / "checkpoints" / "step-0000016")
    (folder / "C" / "checkpoints" / "latest").write_text("step-0000008\n")
    os.rename(folder / "B", folder / "moved")
    resume = ("finetune", "gpt-tiny-lora", "--run-dir", "C", "--resume")
    assert "checkpoint.pretrained_checkpoint" in bridge(*resume, code=2)
    error = bridge(*resume, "peft.dim=4", "checkpoint.pretrained_checkpoint=moved", code=2)
    assert "peft.dim=4: the run was started with 16, and another value changes the model" in error
    bridge(*resume, "checkpoint.pretrained_checkpoint=moved")
    assert trajectory(folder / "C") == trajectory(folder / "L")

    assert "a checkpoint of" in bridge("merge", "L", "--base", "moved", "--output", "M")
    bridge("export", "L", "--to", "hf-peft", "--output", "P")
    assert {path.name for path in (folder / "P").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    bridge(
        "finetune", "gpt-tiny-sft", "--from", "M", *TUNE, "train.train_iters=1", "--run-dir", "S"
    )
    merged = series(folder / "S", "validation/lm loss")
    assert abs(merged[0] / found[-1] - 1) < 1e-5


def test_the_large_recipe_is_ready_for_its_gpu(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 + 1 = ", "completion": "2"}])
    data = (f"dataset.path={tmp_path / 'rows.jsonl'}", "tokenizer.type=bytes")

    def dry_run() -> str:
        return bridge("pretrain", "llama3-8b-lora", "--dry-run", *data)

    assert run_ranks(1, dry_run, process_group=False) == [
        "dry run: llama3-8b-lora is ready for 1 rank\n"
    ]
