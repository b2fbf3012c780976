"""``bridge finetune``: the model is that of the checkpoint and cannot be changed by mistake."""

from pathlib import Path

import pytest
import yaml

import own_recipe
from bridge.cli import main
from bridge.cli.runs.starting_checkpoint import find_starting_checkpoint
from bridge.training.recipe_lookup import find_recipe
from commands import run


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a package of recipes installed and no launcher around."""
    return own_recipe.work_folder(tmp_path, monkeypatch)


def checkpoint(folder: Path, text: str | None) -> None:
    """Write the files of a run with a checkpoint of this configuration."""
    place = folder / "B" / "checkpoints" / "step-0000002"
    place.mkdir(parents=True)
    (place / ".metadata").write_text("")
    (place.parent / "latest").write_text("step-0000002\n")
    if text is not None:
        (place / "config.yaml").write_text(text)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("finetune sine", "--from: fine-tuning needs weights to start from"),
        ("finetune sine --from nowhere", "--from: 'nowhere' does not exist"),
        ("finetune sine --from .", "--from: '.' holds no checkpoint"),
        ("finetune sine --from /etc/passwd", "/etc/passwd' is a file; give the directory"),
        ("finetune sine --from . --run-dir R --resume", "leave --from out"),
        ("finetune sine --resume --run-dir nowhere", "'nowhere' holds no run"),
        ("pretrain sine --from .", "unrecognized arguments: --from"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(
    arguments: str, complaint: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments.split())
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    assert complaint in capsys.readouterr().err
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "config.yaml: is missing; it says what the model is; give a checkpoint"),
        ("- no\n- run\n", "config.yaml: holds no sections; it says what the model is"),
        ("model: {a: b\n", "config.yaml: is not valid YAML"),
        ("recipe: sine\n", "config.yaml: has no section model"),
        ("model: {_target_: a.Model}\n", "is a a.Model, and the recipe sine trains a own_recipe."),
    ],
)
def test_a_checkpoint_of_no_or_another_kind_of_model_is_rejected(
    text: str | None, complaint: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(work, text)
    assert main(["finetune", "sine", "--from", "B", "--dry-run"]) == 2
    assert complaint in capsys.readouterr().err


def test_the_checkpoint_decides_what_the_model_is_and_the_recipe_how_it_is_trained(
    work: Path,
) -> None:
    model = {
        "_target_": "own_recipe.Perceptron",
        "width": 5,
        "hidden_dropout": 0.5,
        "init_method_std": 0.1,
        "tensor_model_parallel_size": 4,
        "parts": {"eye": {"num_layers": 2, "attention_dropout": 0.1}},
    }
    saved = {"model": model, "tokenizer": {"type": "bytes"}, "train": {"train_iters": 7}}
    checkpoint(work, yaml.safe_dump(saved))
    start = find_starting_checkpoint("B", find_recipe("sine"))
    assert start.path == work / "B" / "checkpoints" / "step-0000002"
    assert yaml.safe_load(start.document) == {
        "model": {
            "_target_": "own_recipe.Perceptron",
            "width": 5,
            "parts": {"eye": {"num_layers": 2}},
        },
        "tokenizer": {"type": "bytes"},
    }


def test_a_run_of_two_ranks_is_fine_tuned_resumed_and_keeps_its_overrides(work: Path) -> None:
    assert run("pretrain", "sine", "model.width=5", "--run-dir", "B", folder=work).code == 0
    wrong = run("finetune", "sine", "--from", "B", "model.width=6", "--dry-run", folder=work)
    assert wrong.code == 2
    assert "model.width: the checkpoint" in wrong.err
    assert "is of a model with 5, and 6 would be another" in wrong.err
    tuned = run("finetune", "sine", "--from", "B", "--run-dir", "T", "--nproc", "2", folder=work)
    assert tuned.code == 0, tuned.err
    assert "resume      bridge finetune sine --run-dir T --resume" in tuned.out
    saved = yaml.safe_load((work / "T" / "config.yaml").read_text())
    assert saved["model"]["width"] == 5
    source = saved["checkpoint"]["pretrained_checkpoint"]
    assert source == str(work / "B" / "checkpoints" / "step-0000006")
    again = run(
        "finetune", "sine", "--run-dir", "T", "--resume", "train.train_iters=8", folder=work
    )
    assert again.code == 0, again.err
    assert "continues after step 6" in again.out
