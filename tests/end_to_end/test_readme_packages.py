"""The examples in the packages' READMEs run; their commands pass the checks of a dry run."""

import re
import shlex
from pathlib import Path

import pytest

from commands import run
from ranks import run_ranks
from readmes import PACKAGES, blocks, commands

TEXT = {path.parent.name: path.read_text() for path in PACKAGES}


@pytest.mark.parametrize("package", TEXT)
def test_a_configuration_in_a_command_passes_the_checks(package: str, tmp_path: Path) -> None:
    for line in commands(TEXT[package]):
        if not line.startswith(("bridge pretrain", "bridge show ")) or "--resume" in line:
            continue
        # The data of the example is not there.
        absent = ["dataset.path=null"] if "dataset.path=" in line else []
        dry_run = ["--dry-run"] if line.startswith("bridge pretrain") else []
        ended = run(*shlex.split(line)[1:], *absent, *dry_run, folder=tmp_path)
        assert (ended.code, ended.err) == (0, ""), line


def test_the_picture_of_modules_on_ranks_is_what_show_prints(tmp_path: Path) -> None:
    text = TEXT["bridge-steps-mimo"]
    [line] = [line for line in commands(text) if line.startswith("bridge show")]
    [picture] = [block for block in blocks(text, "") if block.startswith("# rank")]
    assert picture in run(*shlex.split(line)[1:], folder=tmp_path).out


def test_a_run_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = blocks(TEXT["bridge-steps-gpt"], "python")[0]
    quick = "config.train.train_iters, config.validation.eval_iters = 2, 1\nresult ="
    run_ranks(1, exec, example.replace("result =", quick), {}, process_group=False)
    assert re.search(r"^[\d.]+$", capfd.readouterr().out, re.MULTILINE)


def test_adapters_by_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    [example] = blocks(TEXT["bridge-peft"], "python")
    run_ranks(1, exec, example, {}, process_group=False)
    assert capfd.readouterr().out == "0\n"
