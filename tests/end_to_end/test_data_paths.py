"""The text of a run: a file, a glob or token files; messages for data that cannot be used."""

from pathlib import Path

import pytest

from commands import Ended, run
from gpt_data import tree, write_story
from gpt_tiny_runs import SMALL, losses


def train(folder: Path, *overrides: str, ranks: int = 1) -> Ended:
    arguments = (*SMALL, "train.train_iters=2", *overrides)
    return run(
        "pretrain", "gpt-tiny", *arguments, "--run-dir", "R", "--nproc", str(ranks), folder=folder
    )


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with two texts, one that is empty, and one that is short."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write_story(folder / "one.txt")
    write_story(folder / "two.txt", paragraphs=50)
    (folder / "empty.md").write_text("")
    (folder / "short.md").write_text("A few words.")
    return folder


def test_a_file_a_glob_and_token_files_train(tmp_path: Path, texts: Path) -> None:
    built = run("data", "build", str(texts / "one.txt"), "--output", "tokens", folder=tmp_path)
    assert built.code == 0, built.err
    assert built.err == ""
    for number, path in enumerate((texts / "one.txt", texts / "*.txt", tmp_path / "tokens")):
        ended = train(tmp_path / str(number), f"dataset.path={path}")
        assert ended.code == 0, ended.err
        assert ended.err == ""
        assert len(losses(tmp_path / str(number) / "R")) == 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("path", "overrides", "parts"),
    [
        ("nowhere.txt", [], ["dataset.path", "nowhere.txt"]),
        ("empty.md", [], ["dataset.path", "empty.md", "empty"]),
        ("short.md", [], ["model.seq_length", "32"]),
        ("one.txt", ["model.seq_length=20000"], ["model.seq_length", "20000"]),
    ],
)
def test_data_that_cannot_be_used_are_rejected_once_and_leave_nothing(
    tmp_path: Path, texts: Path, path: str, overrides: list[str], parts: list[str], ranks: int
) -> None:
    before = tree(texts)
    ended = train(tmp_path / "work", f"dataset.path={texts / path}", *overrides, ranks=ranks)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert ended.err.count("bridge: ") == 1
    for part in parts:
        assert part in ended.err
    assert tree(tmp_path / "work") == ["stderr", "stdout"]
    assert tree(texts) == before
