"""The table of traps fits the source and the tests, and its tool tells a kill from what is none."""

import ast
import shutil
from pathlib import Path

import pytest

from mutations import (
    Mutation,
    Outcome,
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
def test_a_traps_text_occurs_once_and_its_replacement_is_python(mutation: Mutation) -> None:
    text = mutated(mutation, ROOT)
    ast.parse(text)


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


SOURCE = "def double(x):\n    return 2 * x\n"
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
    source = root / "packages" / "small" / "src" / "bridge" / "small.py"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    (root / "test_small.py").write_text(TEST)
    (root / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    return root


def a_mutation(*, old: str = "2 * x", new: str = "-2 * x", error: str | None = None) -> Mutation:
    return Mutation(
        trap="T0",
        what="twice is not twice",
        file="packages/small/src/bridge/small.py",
        old=old,
        new=new,
        test="test_small.py::test_double",
        error=error,
    )


@pytest.fixture(scope="module")
def outcome(tree: Path) -> Outcome:
    """All tests of the tree with the mutation in it."""
    with copied_packages(tree) as copy:
        (copy / a_mutation().file).write_text(mutated(a_mutation(), tree))
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
    found = verdict(a_mutation(error=error), Outcome(outcome.passed & {name}, failed, None))
    if wrong is None:
        assert found is None
    else:
        assert wrong in (found or "")


def test_a_trap_is_put_into_a_copy(tree: Path) -> None:
    assert try_one(a_mutation(), tree, tree, 100) is None
    assert (tree / a_mutation().file).read_text() == SOURCE


def test_what_cannot_be_tried_is_no_kill(tree: Path) -> None:
    assert "occurs 0 times" in (try_one(a_mutation(old="3 * x"), tree, tree, 100) or "")
    assert "pytest ended with" in (try_one(a_mutation(new="2 *"), tree, tree, 100) or "")


def test_a_module_that_is_not_from_the_copy_is_noticed(tree: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tree, tmp_path / "tree"))
    with (other / "pytest.ini").open("a") as settings:
        settings.write("pythonpath = packages/small/src\n")
    assert "not from the copy" in (try_one(a_mutation(), other, other, 100) or "")
