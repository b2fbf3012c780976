"""The files of a run: `latest` always names a complete checkpoint; nothing is overwritten."""

from pathlib import Path

import pytest

from bridge.training.run_files.directory import (
    RunDirectory,
    find_checkpoint,
    reject_wrong_directory,
    step_of,
)
from bridge.training.usage_error import UsageError


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    for step in (20, 100, 3):
        path = directory.checkpoint(step)
        path.mkdir(parents=True)
        (path / ".metadata").touch()
    return directory


def test_checkpoints_are_listed_by_step(directory: RunDirectory) -> None:
    (directory.checkpoints / "step-0000200.partial").mkdir()
    (directory.checkpoints / "step-0000300").write_text("no folder")
    (directory.checkpoints / "step-0000400").symlink_to("no")
    assert [step_of(path) for path in directory.saved()] == [3, 20, 100]


def test_latest_is_what_was_published_not_the_newest_folder(directory: RunDirectory) -> None:
    directory.publish(directory.checkpoint(20))
    assert directory.latest() == directory.checkpoint(20)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "is missing"),
        (b"", "'' is no checkpoint's name"),
        (b"step-0000999\n", "names step-0000999, which is not there"),
        (b"../../other/step-0000003", "'../../other/step-0000003' is no checkpoint's name"),
        (b"\xff\xfe", "is no text"),
        ("a directory", "cannot be read (Is a directory)"),
    ],
)
def test_a_latest_that_names_no_checkpoint_is_an_error_that_lists_the_steps(
    directory: RunDirectory, content: bytes | str | None, cause: str
) -> None:
    pointer = directory.checkpoints / "latest"
    if isinstance(content, bytes):
        pointer.write_bytes(content)
    elif content is not None:
        pointer.mkdir()
    for call in (directory.latest, lambda: directory.checkpoint_to_resume(None)):
        with pytest.raises(UsageError) as error:
            call()
        assert str(error.value) == (
            f"{pointer}: {cause}; there are checkpoints of the steps 3, 20, 100: continue from one "
            "with --resume --step 100 (checkpoint.step=100)"
        )
    with pytest.raises(UsageError) as error:
        find_checkpoint(directory.path, "--from")
    assert str(error.value) == (
        f"--from: {pointer}: {cause}; give one of its checkpoints, such as "
        f"{directory.checkpoint(100)}"
    )
    with pytest.raises(UsageError, match=r"holds a run already; .* steps 3, 20, 100: continue"):
        reject_wrong_directory(directory, resume=False)
    assert directory.checkpoint_to_resume(20) == directory.checkpoint(20)
    with pytest.raises(UsageError, match=r"checkpoint\.step=4: .* steps 3, 20, 100"):
        directory.checkpoint_to_resume(4)


def test_a_run_whose_rows_go_beyond_a_checkpoint_is_not_started_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.checkpoint_to_resume(None) is None
    text = "checkpoint:\n  save_interval: 3\n...\n"
    directory.config.write_text(text)
    directory.metrics.write_text('{"step": 2}\n{"step": 3}\n{"step": 4')
    assert directory.checkpoint_to_resume(None) is None
    directory.metrics.write_text('{"step": 2}\n{"step": 4}\n')
    with pytest.raises(UsageError, match="come to step 4 and saved every 3; put its checkpoints"):
        directory.checkpoint_to_resume(None)
    directory.config.write_text(text[:-4])
    with pytest.raises(UsageError, match="config.yaml: is cut off"):
        directory.checkpoint_to_resume(None)


@pytest.mark.parametrize(("kind", "cause"), [("file", "is a file"), ("link", "is a link to 'no'")])
def test_a_run_directory_that_is_no_directory_is_an_error(
    tmp_path: Path, kind: str, cause: str
) -> None:
    place = tmp_path / "run"
    if kind == "file":
        place.touch()
    else:
        place.symlink_to("no")
    with pytest.raises(UsageError, match=rf"checkpoint\.run_dir: .*/run' {cause}.*; "):
        RunDirectory(place).holds_a_run()
    with pytest.raises(UsageError, match=rf"--from: .*/run' {cause}"):
        find_checkpoint(place, "--from")


def test_a_checkpoint_is_found_by_its_own_path_and_by_its_run(directory: RunDirectory) -> None:
    directory.publish(directory.checkpoint(100))
    wanted = directory.checkpoint(100)
    assert find_checkpoint(wanted, "field") == wanted
    assert find_checkpoint(directory.path, "field") == wanted


def test_a_path_without_a_checkpoint_is_an_error_that_names_field_and_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"some\.field: .*nowhere.* does not exist"):
        find_checkpoint(tmp_path / "nowhere", "some.field")
    with pytest.raises(ValueError, match=r"some\.field: .* holds no checkpoint"):
        find_checkpoint(tmp_path, "some.field")


def test_an_empty_folder_is_free_and_any_file_takes_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert not directory.holds_a_run()
    assert not RunDirectory(tmp_path / "absent").holds_a_run()
    (tmp_path / "note").touch()
    assert directory.holds_a_run()
