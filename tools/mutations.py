"""Re-introduce each known trap of the loss reduction, and see the test that guards it fail.

    uv run --no-sync python tools/mutations.py              # all traps, two at a time
    uv run --no-sync python tools/mutations.py --only T3    # one trap; may be given again

tools/mutations.toml lists the traps. Each is a few lines of source, replaced in a copy of
packages/ that stands first on the path, while the tests come from the checkout. First all tests
must pass on an unchanged copy. Then, for each trap, its test must fail in its call by an
assertion, or by the error that the entry names; an import error, a skip and a pass do not count.

Prints a Markdown list; the exit code is 1 if a trap survives or no longer applies.
"""

import argparse
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
    """One entry of the table."""

    trap: str
    what: str
    file: str
    old: str
    new: str
    test: str
    error: str | None = None
    """Text of the failure, where it is no assertion."""


def read_table(path: Path = TABLE) -> list[Mutation]:
    """Return the entries in the order of their traps' numbers."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return sorted((Mutation(**entry) for entry in entries), key=lambda m: int(m.trap[1:]))


def mutated(mutation: Mutation, root: Path) -> str:
    """Return the source with the trap in it.

    Raises:
        Outdated: The text to replace does not occur exactly once.
    """
    path = root / mutation.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (count := text.count(mutation.old)) != 1:
        raise Outdated(f"the text to replace occurs {count} times in {mutation.file}")
    return text.replace(mutation.old, mutation.new)


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
    """What pytest reported: each test's id in the report, with what was said of its failure."""

    passed: set[str]
    failed: dict[str, str]
    problem: str | None
    """Why no verdict can be taken from it; None for a run that reported its tests."""


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
    """Return None if the trap was caught as it should be, else what happened instead."""
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
    """Return what is wrong with the tests before anything is changed, None if they all pass."""
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
            text = mutated(mutation, copy)
        except Outdated as error:
            return str(error)
        (copy / mutation.file).write_text(text, encoding="utf-8")
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
    # One state of the packages for all, whatever is edited meanwhile.
    with copied_packages(ROOT) as tree:
        if wrong := check_unchanged(mutations, tree, ROOT, arguments.limit):
            print(f"the tests do not pass on the unchanged packages:\n{_end_of(wrong)}")
            return 1
        survivors = try_all(mutations, tree, ROOT, arguments.limit)
    print(f"\n{len(mutations) - survivors} of {len(mutations)} killed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
