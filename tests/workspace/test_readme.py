"""The README names only what exists. (Its 40-line script is run by the end-to-end tests.)"""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```([a-z]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
TOOL = re.compile(r"\btools/[A-Za-z0-9_./-]*[A-Za-z0-9_]")


@cache
def blocks(*languages: str) -> list[str]:
    """Return the fenced blocks of the README that are in one of these languages."""
    text = (ROOT / "README.md").read_text()
    return [body for language, body in FENCE.findall(text) if language in languages]


@cache
def commands() -> list[str]:
    """Return the command lines of the README, without prompts, comments and continuations."""
    joined = "\n".join(blocks("sh", "bash", "console", "shell")).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line and line[0] != "#"]


def test_it_starts_with_a_training_run_and_then_the_tests() -> None:
    assert commands()[0] == "pip install uv && uv run bridge pretrain gpt-tiny"
    assert "uv run pytest -n auto" in commands()


def test_the_subcommands_of_bridge_that_it_names_exist() -> None:
    pattern = re.compile(r"\b(?:bridge|bridge\.cli) ([a-z][a-z-]*)\b")
    named = {name for line in commands() for name in pattern.findall(line)}
    assert named
    shown = subprocess.run(
        [sys.executable, "-m", "bridge.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    ).stdout
    assert {name for name in named if not re.search(rf"\b{name}\b", shown)} == set()


def test_its_tools_and_links_are_in_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(TOOL.findall(text)) | set(LINK.findall(text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_what_its_python_imports_from_bridge_exists() -> None:
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bridge"):
                assert_importable(node.module or "", [alias.name for alias in node.names])
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("bridge"):
                        importlib.import_module(alias.name)


def assert_importable(module: str, names: list[str]) -> None:
    imported = importlib.import_module(module)
    for name in names:
        if not hasattr(imported, name):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("packages/*/README.md")), ids=lambda path: path.parent.name
)
def test_a_members_readme_is_named_after_it(path: Path) -> None:
    assert path.read_text().startswith(f"# {path.parent.name}\n")
