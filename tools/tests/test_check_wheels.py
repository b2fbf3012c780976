"""The check of the wheels finds the errors of a wrong build."""

from pathlib import Path

import pytest

from check_wheels import Member, closure, content_problems, typed_markers


@pytest.fixture
def members(tmp_path: Path) -> dict[str, Member]:
    files = {
        "state": ["bridge/training/py.typed", "bridge/training/state.py"],
        "loop": ["bridge/training/train.py", "bridge/cli/__init__.py", "bridge/cli/py.typed"],
        "gpt": ["bridge/training/gpt_step.py"],
    }
    siblings = {"state": (), "loop": ("state",), "gpt": ("loop",)}
    for name, paths in files.items():
        for path in paths:
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return {
        name: Member(name=name, siblings=siblings[name], source=tmp_path / name, tests=tmp_path)
        for name in files
    }


def contents(members: dict[str, Member]) -> dict[str, set[str]]:
    return {
        name: {
            path.relative_to(member.source).as_posix()
            for path in member.source.rglob("*")
            if path.is_file()
        }
        for name, member in members.items()
    }


def test_wheels_that_hold_their_sources_and_no_more_pass(members: dict[str, Member]) -> None:
    assert list(content_problems(members, contents(members))) == []


def test_a_file_in_two_wheels_is_reported(members: dict[str, Member]) -> None:
    (members["gpt"].source / "bridge/training/train.py").touch()
    problems = list(content_problems(members, contents(members)))
    assert problems == ["bridge/training/train.py: in the wheels of loop and gpt"]


def test_an_init_file_in_the_shared_namespace_is_reported(members: dict[str, Member]) -> None:
    (members["loop"].source / "bridge/training/__init__.py").touch()
    problems = list(content_problems(members, contents(members)))
    assert problems == [
        "loop: bridge/training/__init__.py closes the namespace that the members share"
    ]


def test_a_source_file_that_the_wheel_lacks_is_reported(members: dict[str, Member]) -> None:
    shipped = contents(members)
    shipped["state"].remove("bridge/training/state.py")
    assert list(content_problems(members, shipped)) == [
        "state: bridge/training/state.py is in the src and not in the wheel"
    ]


def test_a_package_without_py_typed_is_reported(members: dict[str, Member]) -> None:
    (members["loop"].source / "bridge/cli/py.typed").unlink()
    problems = list(content_problems(members, contents(members)))
    assert problems == ["loop: bridge/cli/py.typed is missing"]


def test_the_marker_of_a_package_stands_at_its_top() -> None:
    assert typed_markers({"bridge/gpt/model.py"}) == {"bridge/gpt/py.typed"}
    assert typed_markers({"bridge/training/config/sections.py"}) == {"bridge/training/py.typed"}


def test_a_member_brings_the_siblings_of_its_siblings(members: dict[str, Member]) -> None:
    assert closure(members, "gpt") == ["gpt", "loop", "state"]
    assert closure(members, "state") == ["state"]
