"""The journeys of the README run as they are printed, for a few steps instead of all."""

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from commands import run
from gpt_data import write_story
from hf_models import config_of, tensors_of, write_with_transformers
from ranks import run_ranks
from readmes import PACKAGES, README, blocks, code, commands, section
from sft_data import CHATML, letter_tokenizer
from training_runs import rows, series

GPT = next(path for path in PACKAGES if path.parent.name == "bridge-steps-gpt")
QUICK = ("validation.eval_iters=0", "logger.tensorboard=false")


def lines(title: str, *starts: str) -> list[str]:
    """Return the command lines of a journey that start with one of these words."""
    return [line for line in commands(section(README, title)) if line.startswith(starts)]


def run_line(line: str, folder: Path, *changes: str) -> str:
    """Run a line that starts with ``bridge``; return what it printed."""
    program, *arguments = shlex.split(line)
    assert program == "bridge"
    ended = run(*arguments, *changes, folder=folder)
    assert (ended.code, ended.err) == (0, ""), line
    return ended.out


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in rows(run_dir) if "lm loss" in row]


def test_the_first_run_is_resumed_and_another_trains_on_own_text(tmp_path: Path) -> None:
    (texts := tmp_path / "texts").mkdir()
    for number in range(2):
        write_story(texts / f"{number}.txt", paragraphs=100)
    recipes, show, start, resume, own = lines("1. Try it", "bridge")
    assert "gpt-tiny" in run_line(recipes, tmp_path)
    assert "num_layers: 6" in run_line(show, tmp_path)
    small = (*QUICK, "model.hidden_size=32", "model.ffn_hidden_size=64", "logger.log_interval=1")
    run_line(start, tmp_path, *small, "train.train_iters=2")
    run_line(resume, tmp_path, "train.train_iters=3", "scheduler.lr_decay_iters=2")
    assert steps(tmp_path / "runs/mine") == [1, 2, 3]
    run_line(own, tmp_path, *small, "train.train_iters=2")
    assert steps(tmp_path / "runs/texts") == [1, 2]


def test_the_script_trains_to_the_same_losses_on_one_rank_and_on_two(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = code(README, "own_model.py")
    assert len([line for line in script.splitlines() if line.strip()]) <= 40
    (tmp_path / "own_model.py").write_text(script)
    alone, both = lines("2. A model and a loss of your own", "python", "torchrun")
    assert alone == "python own_model.py"
    options = get_args_parser().parse_args(shlex.split(both)[1:])
    assert (options.nproc_per_node, options.training_script) == ("2", "own_model.py")

    def as_torchrun_starts_it(name: str) -> None:
        sys.argv = ["own_model.py", str(tmp_path / name)]
        runpy.run_path(str(tmp_path / "own_model.py"), run_name="__main__")

    # The ranks are forked, which spares the imports.
    run_ranks(1, as_torchrun_starts_it, "alone", process_group=False)
    output = capfd.readouterr()
    assert re.search(r"^loss [\d.]+ after 40 steps$", output.out, re.M)
    assert "Warning" not in output.err
    run_ranks(2, as_torchrun_starts_it, "both", process_group=False)
    one, two = (series(tmp_path / name, "loss") for name in ("alone", "both"))
    assert len(one) == 10
    assert one[-1] < one[0]
    assert two == pytest.approx(one, rel=1e-5)


def test_the_layout_trains_on_a_cpu_and_every_launcher_has_a_valid_line(tmp_path: Path) -> None:
    on_cpu, dry_run = lines("3. A cluster", "bridge")
    printed = run_line(on_cpu, tmp_path, *QUICK, "train.train_iters=1")
    assert "4 ranks (tensor 2, pipeline 2)" in printed
    assert run_line(dry_run, tmp_path) == "dry run: llama3-8b is ready for 32 ranks\n"

    for line in lines("3. A cluster", "torchrun"):
        options = get_args_parser().parse_args(shlex.split(line)[1:])
        assert options.module
        assert options.training_script == "bridge.cli"
        nodes = int(options.nnodes.rpartition(":")[2])
        ranks = nodes * int(options.nproc_per_node)
        assert_ready(options.training_script_args, ranks, tmp_path)
    [line] = lines("3. A cluster", "srun")
    srun = argparse.ArgumentParser()
    srun.add_argument("--nodes", type=int)
    srun.add_argument("--ntasks-per-node", type=int)
    srun.add_argument("command", nargs=argparse.REMAINDER)
    sizes = srun.parse_args(shlex.split(line)[1:])
    assert sizes.command[0] == "bridge"
    assert_ready(sizes.command[1:], sizes.nodes * sizes.ntasks_per_node, tmp_path)


def assert_ready(arguments: list[str], ranks: int, folder: Path) -> None:
    """Check the configuration of a run on so many ranks, with mock data in place of its files."""
    mock = ("dataset.path=null", "dataset.mock=true", "--dry-run", "--nproc", str(ranks))
    ended = run(*arguments, *mock, folder=folder)
    assert (ended.code, ended.err) == (0, "")
    assert f"is ready for {ranks} ranks" in ended.out


def test_a_hugging_face_model_is_tuned_merged_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    title = "4. Fine-tune a model"
    given = tmp_path / "Llama-3.1-8B"
    letter_tokenizer(given, CHATML)
    write_with_transformers(given, config_of(vocab_size=300), torch.float32)
    [chats] = blocks(section(README, title), "json")
    (tmp_path / "chats.jsonl").write_text(chats * 8)
    small = ("train.global_batch_size=2", "model.seq_length=64", "train.num_workers=0")

    imports, adapt, to_peft, merge, to_hf, show, tune = lines(title, "bridge")
    run_line(imports, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(blocks(section(GPT, "Hugging Face's models"), "python")[0], {})
    printed = run_line(adapt, tmp_path, *QUICK, *small, "train.train_iters=2")
    assert "lora adapts" in printed
    run_line(to_peft, tmp_path)
    adapters = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert adapters["peft_type"] == "LORA"
    run_line(merge, tmp_path)
    run_line(to_hf, tmp_path)
    before, after = tensors_of(given), tensors_of(tmp_path / "Llama-tuned")
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert "position" in run_line(show, tmp_path)
    # This checkpoint and these chats, in place of the first journey's run and all docstrings.
    from_import = tune.replace("--from runs/mine", "--from checkpoints/llama")
    assert from_import != tune
    few = ("dataset.path=chats.jsonl", "dataset.validation_path=chats.jsonl")
    run_line(from_import, tmp_path, *few, "train.train_iters=1", "--run-dir", "runs/tuned")
    assert "validation/lm loss" in rows(tmp_path / "runs/tuned")[0]
    for line in [line for path in PACKAGES for line in commands(path.read_text())]:
        if line.startswith("bridge finetune") and "RECIPE" not in line:
            from_import = re.sub(r"--from \S+", "--from checkpoints/llama", line)
            assert "ready" in run_line(from_import, tmp_path, "--run-dir", "new", "--dry-run")


def test_digits_train_to_the_same_losses_with_the_encoder_on_its_own_rank(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    together, apart, show = lines("5. Images and text", "bridge")
    logged = ("logger.log_interval=1", "logger.tensorboard=false")
    run_line(together, tmp_path, *logged, "train.train_iters=2", "validation.eval_iters=1")
    assert "validation/accuracy" in rows(tmp_path / "runs/digits")[-1]
    alone = ("--run-dir", "runs/apart", "validation.eval_iters=0", *logged)
    run_line(apart, tmp_path, *alone, "train.train_iters=2")
    together_losses, apart_losses = (
        series(tmp_path / "runs" / name, "lm loss") for name in ("digits", "apart")
    )
    assert apart_losses == pytest.approx(together_losses, rel=1e-4)
    assert "# vision    s0 r0 t0  .         .\n" in run_line(show, tmp_path)
