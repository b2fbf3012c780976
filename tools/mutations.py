"""Re-introduce each known trap of the loss reduction, and see the test that guards it fail.

    uv run --no-sync python tools/mutations.py              # all traps, two at a time
    uv run --no-sync python tools/mutations.py --only T3    # one trap; may be given again

tools/mutations.toml lists the traps. Each changes a few expressions or statements of one function
in a copy of packages/. The copy is first on the path; the tests come from the checkout. First all
tests must pass on an unchanged copy. Then, for each trap, its test must fail in its call by an
assertion, or by the error that the entry names. An import error, a skip and a pass do not count.

Prints a Markdown list; the exit code is 1 if a trap survives or no longer applies.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".toml")
JOBS = 2
LIMIT_S = 240

# An exception of the test's own process or of a rank, as pytest prints it.
ASSERTION = re.compile(r"^(E\s+)?(AssertionError|assert |Failed: DID NOT RAISE)", re.MULTILINE)
BROKEN = re.compile(
    r"\b(ImportError|ModuleNotFoundError|SyntaxError|NameError|UnboundLocalError)\b"
)

# Ends the tests' process with an error if a module of ours is not from the copy.
GUARD = """\
import os, sys

def pytest_sessionfinish(session):
    copy = os.environ["MUTATED_COPY"]
    modules = [module for name, module in sys.modules.items() if name.startswith("bridge.")]
    files = [getattr(module, "__file__", None) for module in modules]
    strangers = [file for file in files if file and not file.startswith(copy)]
    if strangers or not any(files):
        session.exitstatus = 100
        print("not from the copy:", strangers or "nothing was imported")
"""


class Outdated(Exception):
    """An entry of the table no longer fits the source or the tests."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One entry of the table: `old` becomes `new`, or `insert` is put in front of `before`."""

    trap: str
    what: str
    function: str
    """Its qualified name, such as `Class.method`; `module:name` where several modules have it."""
    test: str
    old: str | None = None
    new: str | None = None
    before: str | None = None
    insert: str | None = None
    error: str | None = None
    """Text of the failure, where it is no assertion."""

    def __post_init__(self) -> None:
        given = [name for name in ("old", "new", "before", "insert") if getattr(self, name)]
        if given not in (["old", "new"], ["before", "insert"]):
            raise Outdated(f"{self.trap}: give old and new, or before and insert; not {given}")


def read_table(path: Path = TABLE) -> list[Mutation]:
    """Return the entries in the order of their traps' numbers."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return sorted((Mutation(**entry) for entry in entries), key=lambda m: int(m.trap[1:]))


def mutated(mutation: Mutation, root: Path) -> tuple[Path, str]:
    """Return the file of the function, relative to `root`, and its source with the trap in it.

    Raises:
        Outdated: The function, or the code to change in it, does not occur exactly once.
    """
    path, tree, function = _find_function(mutation.function, root)
    if mutation.old is not None and mutation.new is not None:
        code, count = mutation.old, _replace(function, _parse(mutation.old), _parse(mutation.new))
    else:
        code = mutation.before or ""
        count = _insert(function, _parse(code), _parse(mutation.insert or ""))
    if count != 1:
        raise Outdated(f"{code!r} occurs {count} times in {mutation.function}")
    return path.relative_to(root), ast.unparse(ast.fix_missing_locations(tree))


def _parse(code: str) -> list[ast.stmt]:
    try:
        return ast.parse(code).body
    except SyntaxError as error:
        raise Outdated(f"{code!r} is no Python: {error}") from error


def _find_function(name: str, root: Path) -> tuple[Path, ast.Module, ast.AST]:
    module, _, qualified_name = name.rpartition(":")
    text = f"def {qualified_name.rpartition('.')[2]}"
    found = []
    for path in sorted(root.glob("packages/*/src/**/*.py")):
        source = path.read_text(encoding="utf-8")
        in_module = path.with_suffix("").parts[-module.count(".") - 1 :]
        if text in source and (not module or ".".join(in_module) == module):
            tree = ast.parse(source)
            functions = _functions_named(qualified_name.split("."), tree)
            found += [(path, tree, function) for function in functions]
    if len(found) != 1:
        raise Outdated(f"the function {name} occurs {len(found)} times in packages/")
    return found[0]


def _functions_named(names: Sequence[str], scope: ast.AST) -> Iterator[ast.AST]:
    """Yield what has the qualified name within `scope`, through ifs and withs of a module too."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _functions_named(names, node)
        elif node.name == names[0] and len(names) > 1:
            yield from _functions_named(names[1:], node)
        elif node.name == names[0] and not isinstance(node, ast.ClassDef):
            yield node


def _replace(function: ast.AST, old: list[ast.stmt], new: list[ast.stmt]) -> int:
    """Put new code for old, wherever it is; return how often.

    Code is compared as syntax trees, so line breaks, comments and brackets do not matter.
    """
    if isinstance(old[0], ast.Expr) and isinstance(new[0], ast.Expr) and len(old + new) == 2:
        replacement = _ExpressionReplacement(old[0].value, new[0].value)
        replacement.visit(function)
        return replacement.count
    count, size = 0, len(old)
    for statements in _statement_lists(function):
        for index in reversed(range(len(statements))):
            if list(map(ast.dump, statements[index : index + size])) == list(map(ast.dump, old)):
                statements[index : index + size] = new
                count += 1
    return count


class _ExpressionReplacement(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new, self.count = ast.dump(old), new, 0

    @override
    def visit(self, node: ast.AST) -> Any:
        if ast.dump(node) == self.old:
            self.count += 1
            return self.new
        return self.generic_visit(node)


def _insert(function: ast.AST, before: list[ast.stmt], new: list[ast.stmt]) -> int:
    """Put statements in front of those that hold the code `before`; return how often."""
    wanted = before[0].value if isinstance(before[0], ast.Expr) else before[0]
    count = 0
    for statements in _statement_lists(function):
        for index in reversed(range(len(statements))):
            if any(ast.dump(node) == ast.dump(wanted) for node in _own_nodes(statements[index])):
                statements[index:index] = new
                count += 1
    return count


def _statement_lists(function: ast.AST) -> list[list[Any]]:
    fields = [value for node in ast.walk(function) for _, value in ast.iter_fields(node)]
    return [value for value in fields if isinstance(value, list) and _is_statement(value[:1])]


def _own_nodes(statement: ast.AST) -> Iterator[ast.AST]:
    """Yield a statement and its expressions, without the statements in it."""
    yield statement
    for child in ast.iter_child_nodes(statement):
        if not _is_statement([child]):
            yield from _own_nodes(child)


def _is_statement(nodes: Sequence[Any]) -> bool:
    return any(isinstance(node, ast.stmt) for node in nodes)


@contextmanager
def copied_packages(tree: Path) -> Iterator[Path]:
    """Give a directory with a copy of the tree's packages/ and the guard; remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        copy = Path(directory).resolve()
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
        shutil.copytree(tree / "packages", copy / "packages", ignore=ignored)
        (copy / "imported_from_the_copy.py").write_text(GUARD)
        yield copy


@dataclass(frozen=True)
class Outcome:
    """A report of pytest: the ids of the tests, with the messages of their failures."""

    passed: set[str]
    failed: dict[str, str]
    problem: str | None
    """The reason why it has no verdict; None if the tests were run."""


def run_tests(tests: Sequence[str], copy: Path, root: Path, limit_s: float) -> Outcome:
    """Run tests of the checkout against the packages in `copy`."""
    report = copy / "report.xml"
    sources = sorted(str(path) for path in (copy / "packages").glob("*/src"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*sources, str(copy)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MUTATED_COPY": str(copy),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "imported_from_the_copy"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={copy / 'tmp'}"]
    process = subprocess.Popen(
        [*command, *tests],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome(set(), {}, f"killed after {limit_s:.0f} s")
    if process.returncode not in (0, 1):
        return Outcome(set(), {}, f"pytest ended with {process.returncode}:\n{output[-3000:]}")
    return read_report(report)


def read_report(report: Path) -> Outcome:
    """Read pytest's JUnit report."""
    passed: set[str] = set()
    failed: dict[str, str] = {}
    problem = None
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if (error := case.find("error")) is not None:
            problem = f"{name} could not start:\n{error.text}"
        elif (failure := case.find("failure")) is not None:
            failed[name] = f"{failure.get('message')}\n{failure.text}"
        elif case.find("skipped") is None:
            passed.add(name)
    return Outcome(passed, failed, problem)


def verdict(mutation: Mutation, outcome: Outcome) -> str | None:
    """Return None if the trap was caught, else what happened instead."""
    if outcome.problem:
        return outcome.problem
    if not outcome.failed:
        return "SURVIVED: the test passes" if outcome.passed else "SURVIVED: the test is skipped"
    said = "\n".join(outcome.failed.values())
    if mutation.error is not None:
        return None if mutation.error in said else f"{_end_of(said)}\nis without {mutation.error!r}"
    if BROKEN.search(said) or not ASSERTION.search(said):
        return f"{_end_of(said)}\nis no failed assertion"
    return None


def check_unchanged(
    mutations: Iterable[Mutation], tree: Path, root: Path, limit_s: float
) -> str | None:
    """Return the failures of the tests before anything is changed, None if they all pass."""
    tests = sorted({mutation.test for mutation in mutations})
    with copied_packages(tree) as copy:
        outcome = run_tests(tests, copy, root, limit_s * len(tests))
    if outcome.problem or outcome.failed:
        return outcome.problem or "\n".join(outcome.failed.values())
    return None if len(outcome.passed) >= len(tests) else "some of the tests are skipped"


def try_one(mutation: Mutation, tree: Path, root: Path, limit_s: float) -> str | None:
    """Put a trap into a copy of the tree's packages and run its test, which must fail.

    Returns:
        What happened instead, None if it failed as it should.
    """
    with copied_packages(tree) as copy:
        try:
            file, text = mutated(mutation, copy)
        except Outdated as error:
            return str(error)
        (copy / file).write_text(text, encoding="utf-8")
        return verdict(mutation, run_tests([mutation.test], copy, root, limit_s))


def try_all(mutations: Sequence[Mutation], tree: Path, root: Path, limit_s: float) -> int:
    """Try every trap, print a line for each, and return how many were not caught."""
    survivors = 0
    with ThreadPoolExecutor(JOBS) as pool:
        results = pool.map(lambda mutation: try_one(mutation, tree, root, limit_s), mutations)
        for mutation, wrong in zip(mutations, results, strict=True):
            what = f"`{mutation.test}` ({mutation.what})"
            if wrong is None:
                print(f"- {mutation.trap} killed by {what}", flush=True)
            else:
                survivors += 1
                print(f"- {mutation.trap} **not killed** by {what}: {_end_of(wrong)}", flush=True)
    return survivors


def _end_of(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="TRAP", action="append", help="this trap, such as T3")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for one test")
    arguments = parser.parse_args()
    mutations = read_table()
    if arguments.only:
        unknown = set(arguments.only) - {mutation.trap for mutation in mutations}
        if unknown:
            parser.error(f"no entry for {', '.join(sorted(unknown))}")
        mutations = [mutation for mutation in mutations if mutation.trap in arguments.only]
    # All traps are put into one state of the packages, even if files are edited meanwhile.
    with copied_packages(ROOT) as tree:
        if wrong := check_unchanged(mutations, tree, ROOT, arguments.limit):
            print(f"the tests do not pass on the unchanged packages:\n{_end_of(wrong)}")
            return 1
        survivors = try_all(mutations, tree, ROOT, arguments.limit)
    print(f"\n{len(mutations) - survivors} of {len(mutations)} killed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
