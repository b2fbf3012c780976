"""A bug in a user's code keeps its traceback; a rejection is one line, whoever raises it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

import own_recipe
from bridge.training.config import ConfigContainer, ConfigError, resolve
from bridge.training.config.schema.importable_names import import_by_name
from bridge.training.usage_error import UsageError
from commands import Ended, run


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_recipe.work_folder(tmp_path, monkeypatch)


def fail(fault: str, folder: Path) -> Ended:
    """Run the recipe that fails."""
    return run("pretrain", "faulty", *fault.split(), "--run-dir", "R", folder=folder)


@pytest.mark.parametrize(
    ("fault", "function", "last"),
    [
        ("dataset.place=build", "build", "in set-up: ValueError: dataset.place=build: fails"),
        ("dataset.place=length", "__len__", "in set-up: ValueError: dataset.place=length: fails"),
        ("dataset.place=sample", "__getitem__", "in step 1: ValueError"),
        ("dataset.place=sample train.num_workers=2", "__getitem__", "in step 1: ValueError"),
        (
            "dataset.place=sample train.num_workers=1 dataset.error=KeyError",
            "__getitem__",
            "in step 1: KeyError",
        ),
        ("dataset.place=collate train.num_workers=1", "collate", "in step 1: ValueError"),
        ("model.fails=true", "build", "in set-up: ValueError: the model fails"),
    ],
)
def test_a_bug_of_the_users_own_code_keeps_its_traceback(
    fault: str, function: str, last: str, tmp_path: Path
) -> None:
    ended = fail(fault, tmp_path)
    assert ended.code == 1
    assert "Traceback (most recent call last)" in ended.err
    assert f", in {function}" in ended.err
    assert "own_recipe.py" in ended.err
    assert last in ended.err


def test_a_batch_that_a_worker_cannot_send_ends_the_run(tmp_path: Path) -> None:
    ended = fail("dataset.place=sending train.num_workers=1", tmp_path)
    assert ended.code == 1
    assert (
        "AttributeError: Can't pickle local object 'Faulty.collate.<locals>.<lambda>'" in ended.err
    )
    assert "data loading worker 1 of 1" in ended.err
    assert "ended with exit code 1" in ended.err


def test_a_folder_for_temporary_files_with_too_long_a_name_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    ended = fail("train.num_workers=1", tmp_path)
    assert ended.code == 2
    assert "train.num_workers=1: data loading workers make sockets in the folder" in ended.err
    assert "Traceback" not in ended.err
    assert fail("train.num_workers=0", tmp_path).code == 0


@pytest.mark.parametrize(
    "fault",
    [
        "dataset.place=sample",
        "dataset.place=sample train.num_workers=2",
        "dataset.place=collate train.num_workers=1",
    ],
)
def test_a_rejection_of_the_users_own_code_is_one_line(fault: str, tmp_path: Path) -> None:
    ended = fail(f"{fault} dataset.error=UsageError", tmp_path)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert [line for line in ended.err.splitlines() if line.startswith("bridge: ")] == [
        f"bridge: {fault.split()[0]}: fails"
    ]


def configuration(dataset: str) -> str:
    return f"model: {{_target_: own_recipe.Perceptron}}\ndataset: {{_target_: {dataset}}}\n"


def test_a_section_that_a_file_names_is_made_with_the_same_rule() -> None:
    with pytest.raises(ConfigError, match="Faulty rejects these values: .*=section: fails"):
        ConfigContainer.from_yaml(
            configuration("own_recipe.Faulty, place: section, error: UsageError")
        )
    with pytest.raises(ValueError, match="place=section: fails") as raised:
        ConfigContainer.from_yaml(configuration("own_recipe.Faulty, place: section"))
    assert type(raised.value) is ValueError
    assert raised.value.__notes__ == ["while making a Faulty of the configuration"]


@dataclass
class FussyTransformer(TransformerConfig):
    """A model section with a check of its own."""

    kernel_count: int = 3

    def build(self, *_: Any) -> Any:
        raise NotImplementedError

    def finalized(self) -> "FussyTransformer":
        if self.kernel_count == 1:
            raise ValueError("a bug")
        if self.kernel_count == 2:
            raise UsageError("model.kernel_count=2: give another number")
        return dataclasses.replace(self)


def test_a_models_own_check_keeps_its_traceback_and_megatrons_is_a_problem() -> None:
    def resolved(**fields: Any) -> None:
        model = FussyTransformer(num_layers=1, hidden_size=8, num_attention_heads=2)
        for name, value in fields.items():
            setattr(model, name, value)
        config = ConfigContainer(model=model, dataset=own_recipe.Sine())
        config.train.train_iters = 1
        resolve(config, device="cpu", world_size=1)

    with pytest.raises(ValueError, match="^a bug$"):
        resolved(kernel_count=1)
    with pytest.raises(ConfigError, match="model.kernel_count=2: give another number"):
        resolved(kernel_count=2)
    with pytest.raises(ConfigError, match="model.recompute_method"):
        resolved(recompute_method="diagonal", recompute_granularity="full")


def test_a_module_that_fails_while_it_is_imported_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("int('seven')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="invalid literal") as raised:
        import_by_name("broken_module.Data")
    assert str(raised.traceback[-1].path).endswith("broken_module.py")


@pytest.mark.parametrize("name", [".", "a..b", ".a.B", "torch.nn.", "a b.C"])
def test_a_value_that_is_no_name_is_rejected(name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a class or function"):
        import_by_name(name)
