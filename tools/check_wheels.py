"""Build every wheel and check that each works alone.

    uv run tools/check_wheels.py                     # all members, with their tests
    uv run tools/check_wheels.py bridge-state        # one member
    uv run tools/check_wheels.py --no-tests          # contents and imports only, seconds
    uv run tools/check_wheels.py --out DIST          # keep the wheels

Contents: no file in two wheels, no `__init__.py` in a namespace folder, every source file in its
wheel, a py.typed for every import package.

Alone: each wheel is installed, with the siblings that it declares and nothing else of ours, into
an environment of its own; third-party packages are linked in from the environment that runs this
script. There, outside the checkout, all of its modules are imported and its tests run. Code that
only works because the workspace has every package installed fails here. (tools/declared.py checks
that third-party imports are declared.)
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from declared import distribution_name

ROOT = Path(__file__).resolve().parent.parent
NAMESPACES = ("bridge", "bridge/training")
# bridge-state owns the marker of the shared folder; two owners would delete it for each other.
TRAINING_MARKER = "bridge/training/py.typed"
IMPORT_ALL = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"


@dataclass(kw_only=True, frozen=True)
class Member:
    """One distribution of the workspace."""

    name: str
    siblings: tuple[str, ...]
    source: Path
    tests: Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("members", nargs="*", help="names of the members to try (default: all)")
    parser.add_argument("--no-tests", action="store_true", help="do not run the members' tests")
    parser.add_argument("--out", type=Path, help="folder to leave the wheels in")
    args = parser.parse_args()
    members = {member.name: member for member in read_members()}
    if unknown := sorted(set(args.members) - members.keys()):
        parser.error(f"no such member: {', '.join(unknown)}; there are {', '.join(members)}")

    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        temporary = Path(folder)
        wheels = build(members, args.out or temporary / "dist")
        contents = {name: shipped_files(wheel) for name, wheel in wheels.items()}
        problems += content_problems(members, contents)
        report("contents", not problems)
        for name in args.members or members:
            problems += alone_problems(
                members, name, wheels, contents[name], temporary / name, tests=not args.no_tests
            )
    print("\n".join(problems) or f"{len(args.members or members)} wheels work alone")
    return bool(problems)


def read_members() -> Iterator[Member]:
    pyprojects = sorted((ROOT / "packages").glob("*/pyproject.toml"))
    projects = {path: tomllib.loads(path.read_text())["project"] for path in pyprojects}
    names = {project["name"] for project in projects.values()}
    for path, project in projects.items():
        needed = [distribution_name(r) for r in project.get("dependencies", [])]
        yield Member(
            name=project["name"],
            siblings=tuple(name for name in needed if name in names),
            source=path.parent / "src",
            tests=ROOT / "tests" / project["name"].removeprefix("bridge-").replace("-", "_"),
        )


def build(members: dict[str, Member], out: Path) -> dict[str, Path]:
    """Build the wheel of every member into `out`; return them by the member's name."""
    wheels = {}
    for name in members:
        stem = name.replace("-", "_")
        for stale in out.glob(f"{stem}-*.whl"):
            stale.unlink()
        command = ["build", "--quiet", "--no-sources", "--wheel", "--package", name, "-o", str(out)]
        uv(*command, cwd=ROOT)
        [wheels[name]] = out.glob(f"{stem}-*.whl")
    return wheels


def shipped_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    return {name for name in names if ".dist-info/" not in name}


def content_problems(members: dict[str, Member], contents: dict[str, set[str]]) -> Iterator[str]:
    owners: dict[str, list[str]] = {}
    for name, shipped in contents.items():
        for file in shipped:
            owners.setdefault(file, []).append(name)
    for file, names in sorted(owners.items()):
        if len(names) > 1:
            yield f"{file}: in the wheels of {' and '.join(names)}"
        if file in {f"{namespace}/__init__.py" for namespace in NAMESPACES}:
            yield f"{names[0]}: {file} closes the namespace that the members share"
    for name, member in members.items():
        in_source = {
            path.relative_to(member.source).as_posix()
            for path in member.source.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        for file in sorted(in_source ^ contents[name]):
            here, there = ("src", "wheel") if file in in_source else ("wheel", "src")
            yield f"{name}: {file} is in the {here} and not in the {there}"
        for marker in sorted(typed_markers(contents[name])):
            if marker not in owners:
                yield f"{name}: {marker} is missing"


def typed_markers(shipped: set[str]) -> set[str]:
    """Return the py.typed files that the modules of a wheel need, one for each import package."""
    markers = set()
    for file in shipped:
        if file.startswith("bridge/training/"):
            markers.add(TRAINING_MARKER)
        elif file.endswith(".py"):
            markers.add("/".join([*file.split("/")[:2], "py.typed"]))
    return markers


def alone_problems(
    members: dict[str, Member],
    name: str,
    wheels: dict[str, Path],
    shipped: set[str],
    folder: Path,
    *,
    tests: bool,
) -> list[str]:
    """Import and test one member in an environment that has only what it declares."""
    needed = closure(members, name)
    python = environment(folder, [wheels[sibling] for sibling in needed])
    modules = sorted(
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in shipped
        if file.endswith(".py")
    )
    problems = []
    if not attempt(f"{name} imports", [python, "-c", IMPORT_ALL, *modules], folder):
        problems.append(f"{name}: not every module imports with {', '.join(needed)} alone")
    if tests:
        pytest = [python, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider"]
        where = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        if not member_tests(members[name]):
            problems.append(f"{name}: {members[name].tests.relative_to(ROOT)} has no tests")
        elif not attempt(f"{name} tests", [*pytest, *where, str(members[name].tests)], folder):
            problems.append(f"{name}: its tests fail with {', '.join(needed)} alone")
    return problems


def member_tests(member: Member) -> list[Path]:
    return sorted(member.tests.rglob("test_*.py"))


def closure(members: dict[str, Member], name: str) -> list[str]:
    """Return a member and the siblings that it declares, theirs included."""
    found = [name]
    for sibling in members[name].siblings:
        found += closure(members, sibling)
    return list(dict.fromkeys(found))


def environment(folder: Path, wheels: list[Path]) -> str:
    """Make an environment with these wheels and this one's third-party packages."""
    venv = folder / "venv"
    uv("venv", "--quiet", "--python", sys.executable, str(venv))
    python = str(venv / "bin" / "python")
    there = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        ours = entry.name.startswith(("bridge_", "__editable__", "_virtualenv", "__pycache__"))
        if not ours and not (there / entry.name).exists():
            (there / entry.name).symlink_to(entry)
    install = ["pip", "install", "--quiet", "--offline", "--no-deps", "--no-index"]
    uv(*install, "--link-mode", "copy", "--python", python, *map(str, wheels))
    return python


def attempt(label: str, command: list[str], folder: Path) -> bool:
    """Run a command outside the checkout, show its output where it fails."""
    begin = time.monotonic()
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # A `bridge` or `python` that a test starts by name is this environment's.
    variables["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    last_line = lines[-1] if lines and "pytest" in command else ""
    report(label, done.returncode == 0, time.monotonic() - begin, last_line)
    if done.returncode:
        print(done.stdout, flush=True)
    return done.returncode == 0


def report(label: str, ok: bool, seconds: float = 0, last_line: str = "") -> None:
    print(f"{label:26} {'ok' if ok else 'FAILED':6} {seconds:6.1f} s  {last_line}", flush=True)


def uv(*arguments: str, cwd: Path | None = None) -> None:
    executable = shutil.which("uv")
    if executable is None:
        sys.exit("tools/check_wheels.py needs uv: pip install uv")
    subprocess.run([executable, *arguments], cwd=cwd, check=True)


if __name__ == "__main__":
    sys.exit(main())
