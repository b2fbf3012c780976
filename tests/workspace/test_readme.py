"""The READMEs name only what exists. (The journeys of the root README run end to end.)"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from readmes import PACKAGES, README, READMES, ROOT, blocks, commands, imported, section

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)")
FILE = re.compile(r"(?:tools|tests|packages|\.ci)/[A-Za-z0-9_./-]*[A-Za-z0-9_]")
SOURCE = re.compile(r"`(bridge/[\w/]+\.py)`(?: `(\w+)`)?")
DOTTED = re.compile(r"`(bridge(?:\.\w+)+)[`(]")
ENTRY_POINTS = {"bridge.recipes", "bridge.commands", "bridge.exporters"}
ARCHITECTURE = ROOT / "packages" / "README.md"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_it_starts_with_an_installation_and_a_training_run() -> None:
    assert commands(README.read_text())[:2] == [
        "pip install uv && uv sync",
        "uv run bridge pretrain gpt-tiny",
    ]
    assert "uv run pytest -n auto" in commands(section(README, "Developing"))


def test_the_subcommands_of_bridge_that_they_name_exist() -> None:
    pattern = re.compile(r"\b(?:bridge|bridge\.cli) ([a-z][a-z-]*)\b")
    lines = [line for path in READMES for line in commands(path.read_text())]
    named = {name for line in lines for name in pattern.findall(line)}
    assert named
    shown = subprocess.run(
        [sys.executable, "-m", "bridge.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    ).stdout
    assert {name for name in named if not re.search(rf"\b{name}\b", shown)} == set()


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_its_links_and_the_files_that_it_names_are_in_the_tree(path: Path) -> None:
    text = path.read_text()
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    for target, heading in LINK.findall(text):
        file = path.parent / target if target else path
        found = file / "README.md" if file.is_dir() else file
        if not found.exists() or (heading and heading not in anchors(found)):
            missing.append(f"{target}#{heading}")
    assert missing == []


def anchors(path: Path) -> set[str]:
    """Return the anchors of a file's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_what_its_python_imports_from_bridge_exists(path: Path) -> None:
    for module, name in imported(path.read_text()):
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_the_dotted_names_in_its_text_exist(path: Path) -> None:
    for name in sorted(set(DOTTED.findall(path.read_text())) - ENTRY_POINTS):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", PACKAGES, ids=relative)
def test_a_members_readme_is_named_after_it(path: Path) -> None:
    assert path.read_text().startswith(f"# {path.parent.name}\n")


def sources(path: str) -> list[Path]:
    """Return the files of an import path, which is in one package or in several."""
    return sorted(ROOT.glob(f"packages/*/src/{path}"))


def test_the_sources_that_the_architecture_names_exist_with_their_names() -> None:
    missing = []
    for path, name in SOURCE.findall(ARCHITECTURE.read_text()):
        defined = rf"^(?:\s*(?:def|class) {name}\b|{name} = )"
        text = "".join(file.read_text() for file in sources(path))
        if not text or (name and not re.search(defined, text, re.MULTILINE)):
            missing.append((path, name))
    assert missing == []


@pytest.mark.parametrize("member", sorted(ROOT.glob("packages/*/src")), ids=relative)
def test_the_map_has_every_folder_of_a_package(member: Path) -> None:
    package = member.parent.name
    [title] = re.findall(rf"^### ({package}: .*)$", ARCHITECTURE.read_text(), re.MULTILINE)
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", section(ARCHITECTURE, title), re.MULTILINE)
    folders = {file.parent.relative_to(member).as_posix() for file in member.rglob("*.py")}
    assert {folder for folder, _ in rows} == folders
    for folder, subject in rows:
        files = re.findall(r"`(\w+\.py)`", subject)
        assert [name for name in files if not (member / folder / name).exists()] == []


def test_the_picture_of_imports_is_in_the_order_that_is_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [layers] = [c["layers"] for c in settings["contracts"] if c.get("exhaustive")]
    depth = {name: number for number, line in enumerate(layers) for name in line.split(" | ")}
    [picture] = blocks(section(ARCHITECTURE, "What imports what"), "")
    lines = [re.split(r"\s{2,}", line)[0].split(", ") for line in picture.splitlines()]
    assert [name for line in lines for name in line if name not in depth] == []
    for above, below in zip(lines, lines[1:], strict=False):
        assert max(depth[name] for name in above) < min(depth[name] for name in below), below
