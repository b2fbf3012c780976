"""Tests of tools/mutations.py: its table fits the packages, and only a real kill counts as one."""

import ast
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mutations import (
    Mutation,
    Outcome,
    Outdated,
    copied_packages,
    mutated,
    read_table,
    run_tests,
    try_one,
    verdict,
)

ROOT = Path(__file__).resolve().parents[2]
TABLE = read_table()


@pytest.mark.parametrize("mutation", TABLE, ids=lambda mutation: mutation.trap)
def test_a_trap_still_fits_the_packages(mutation: Mutation) -> None:
    file, text = mutated(mutation, ROOT)
    assert text != ast.unparse(ast.parse((ROOT / file).read_text()))


@pytest.mark.parametrize("mutation", TABLE, ids=lambda mutation: mutation.trap)
def test_a_traps_test_exists(mutation: Mutation) -> None:
    path, *names = mutation.test.partition("[")[0].split("::")
    body = ast.parse((ROOT / path).read_text()).body
    for name in names:
        (node,) = (
            node
            for node in body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        )
        body = node.body


def test_the_table_has_every_trap() -> None:
    assert {mutation.trap for mutation in TABLE} == {f"T{number}" for number in range(1, 26)}


SOURCE = """\
def double(x):
    return 2 * x


class Sum:
    def of(self, numbers):
        total = 0
        for number in numbers:
            total += (
                number  # one after the other
            )
            print("added")
        print("added")
        return total

    def __call__(self, numbers):
        total = 0
        return total


def of(x):
    return 2 * x
"""
FILE = Path("packages/small/src/bridge/small.py")
TEST = """\
import pytest
from bridge.small import double

def test_double():
    assert double(3) == 6

def test_nothing():
    assert double(3)

def test_positive():
    if double(3) < 0:
        raise ValueError("negative")

def test_import():
    if double(3) != 6:
        import no_such_module

def test_skipped():
    pytest.skip("always")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    source = root / FILE
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    (root / "test_small.py").write_text(TEST)
    (root / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    return root


def a_mutation(**changes: str) -> Mutation:
    values = {"old": "2 * x", "new": "-2 * x"} if "before" not in changes else {}
    values |= {"function": "double", "test": "test_small.py::test_double"}
    return Mutation(trap="T0", what="twice is not twice", **(values | changes))


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"function": "double"}, {"return -2 * x"}),
        ({"function": "bridge.small:of"}, {"return -2 * x"}),
        ({"function": "Sum.of", "old": "total += number", "new": "pass"}, {"pass"}),
        (
            {"function": "Sum.of", "old": "total += number\nprint('added')", "new": "total = 1"},
            {"total = 1"},
        ),
        (
            {"function": "Sum.of", "before": "number", "insert": "number = 1\nnumber = -number"},
            {"number = 1", "number = -number"},
        ),
        ({"function": "Sum.of", "before": "numbers", "insert": "numbers = []"}, {"numbers = []"}),
        ({"function": "Sum.__call__", "old": "0", "new": "1"}, {"total = 1"}),
    ],
    ids=lambda value: value.get("function") if isinstance(value, dict) else "",
)
def test_code_of_one_function_is_changed_however_it_is_written(
    tree: Path, change: dict[str, str], lines: set[str]
) -> None:
    file, text = mutated(a_mutation(**change), tree)
    assert file == FILE
    before = ast.unparse(ast.parse(SOURCE)).splitlines()
    new = [line.strip() for line in text.splitlines() if line not in before]
    assert set(new) == lines


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"function": "triple"}, "the function triple occurs 0 times"),
        ({"function": "Sum"}, "the function Sum occurs 0 times"),
        ({"function": "other:double"}, "the function other:double occurs 0 times"),
        ({"old": "3 * x"}, "'3 * x' occurs 0 times in double"),
        (
            {"function": "Sum.of", "old": "print('added')", "new": "pass"},
            "occurs 2 times in Sum.of",
        ),
        ({"function": "Sum.of", "before": "print", "insert": "pass"}, "occurs 2 times in Sum.of"),
        ({"new": "2 *"}, "'2 *' is no Python"),
        ({"function": "Sum.of", "before": "print", "insert": ""}, "not ['before']"),
    ],
)
def test_a_trap_that_fits_nothing_or_several_places_is_outdated(
    tree: Path, change: dict[str, str], reason: str
) -> None:
    with pytest.raises(Outdated, match=re.escape(reason)):
        mutated(a_mutation(**change), tree)


@pytest.fixture(scope="module")
def outcome(tree: Path) -> Outcome:
    """Return the outcome of all tests of the tree with the mutation in it."""
    with copied_packages(tree) as copy:
        (copy / FILE).write_text(mutated(a_mutation(), tree)[1])
        return run_tests(["test_small.py"], copy, tree, 100)


@pytest.mark.parametrize(
    ("test", "error", "wrong"),
    [
        ("test_double", None, None),
        ("test_positive", "negative", None),
        ("test_positive", None, "no failed assertion"),
        ("test_positive", "too large", "is without 'too large'"),
        ("test_import", None, "no failed assertion"),
        ("test_nothing", None, "SURVIVED: the test passes"),
        ("test_skipped", None, "SURVIVED: the test is skipped"),
    ],
)
def test_only_a_failed_assertion_or_the_named_error_is_a_kill(
    outcome: Outcome, test: str, error: str | None, wrong: str | None
) -> None:
    name = f"test_small::{test}"
    failed = {key: said for key, said in outcome.failed.items() if key == name}
    found = verdict(
        replace(a_mutation(), error=error), Outcome(outcome.passed & {name}, failed, None)
    )
    if wrong is None:
        assert found is None
    else:
        assert wrong in (found or "")


def test_a_trap_is_put_into_a_copy(tree: Path) -> None:
    assert try_one(a_mutation(), tree, tree, 100) is None
    assert (tree / FILE).read_text() == SOURCE


def test_what_cannot_be_tried_is_no_kill(tree: Path) -> None:
    assert "occurs 0 times" in (try_one(a_mutation(old="3 * x"), tree, tree, 100) or "")
    missing = a_mutation(test="test_small.py::test_missing")
    assert "pytest ended with" in (try_one(missing, tree, tree, 100) or "")


def test_a_module_that_is_not_from_the_copy_is_noticed(tree: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tree, tmp_path / "tree"))
    with (other / "pytest.ini").open("a") as settings:
        settings.write("pythonpath = packages/small/src\n")
    assert "not from the copy" in (try_one(a_mutation(), other, other, 100) or "")
