"""A run's files: `latest` always names a whole checkpoint, and nothing is overwritten."""

from pathlib import Path

import pytest

from bridge.training.run_directory import RunDirectory, find_checkpoint, replace_durably, step_of


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
    assert [step_of(path) for path in directory.saved()] == [3, 20, 100]


def test_latest_is_what_was_published_not_the_newest_folder(directory: RunDirectory) -> None:
    assert directory.latest() is None
    directory.publish(directory.checkpoint(20))
    assert directory.latest() == directory.checkpoint(20)


def test_a_latest_that_names_nothing_is_an_error_that_lists_what_there_is(
    directory: RunDirectory,
) -> None:
    replace_durably(directory.checkpoints / "latest", "step-0000999\n")
    with pytest.raises(ValueError, match=r"step-0000999.*step-0000100"):
        directory.latest()


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
