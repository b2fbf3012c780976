"""Boundaries: the shared namespace, licenses, light contract modules, tests and tools."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMBERS = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
TOP_LEVEL = {"packages", "tests", "tools", "pyproject.toml", "uv.lock", "README.md", "LICENSE"}

# A user's own forward step or loss imports these; they must not pull in a training stack.
# Imported one after the other: the losses import nothing but torch, the others nothing heavy.
LOSSES = ["losses", "loss.normalization"]
LIGHT_MODULES = [
    "loss_reduction",
    "forward_step",
    "contracts",
    "callbacks",
    "metric_loggers",
    "state",
]
HEAVY_PACKAGES = ["megatron", "transformer_engine", "tensorboard", "wandb", "datasets", "yaml"]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_no_member_closes_the_shared_namespace(member: Path) -> None:
    for folder in ("bridge", "bridge/training"):
        assert not (member / "src" / folder / "__init__.py").exists()


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_a_member_carries_its_readme_and_the_license(member: Path) -> None:
    assert (member / "README.md").read_text().strip()
    assert (member / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def imports_of(folder: Path) -> set[str]:
    """Return the first names of everything that the modules of a folder import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def test_tools_and_tests_import_nothing_of_each_other() -> None:
    tools = {path.stem for path in (ROOT / "tools").rglob("*.py")}
    support = {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}
    assert tools & support == set()
    assert imports_of(ROOT / "tests") & tools == set()
    assert imports_of(ROOT / "tools") & support == set()


def test_the_readme_of_the_tests_has_every_folder_and_support_file() -> None:
    text = (ROOT / "tests" / "README.md").read_text()
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    support = {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}
    assert {name for name in folders if f"| `{name}/` |" not in text} == set()
    assert {name for name in support if f"`{name}`" not in text} == set()


def test_the_top_of_the_repository_holds_only_what_belongs_there() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = {line.partition("/")[0] for line in listing.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} - TOP_LEVEL == set()


def test_what_a_custom_step_imports_brings_no_training_stack() -> None:
    program = (
        "import importlib, json, sys, torch\n"
        "before = set(sys.modules)\n"
        f"for name in {LOSSES}: importlib.import_module('bridge.training.' + name)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "more = sorted(new - set(sys.stdlib_module_names) - {'bridge', 'torch'})\n"
        f"for name in {LIGHT_MODULES}: importlib.import_module('bridge.training.' + name)\n"
        f"heavy = [*{HEAVY_PACKAGES}, 'bridge.training.config']\n"
        "print(json.dumps(more + [name for name in heavy if name in sys.modules]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    assert json.loads(found.stdout) == []


# For types alone: contracts name the container, which consists of what they describe, and so do
# the two modules that fill it in; a family of GPT models names the section that it converts.
TYPE_ONLY = [
    ("bridge.training.contracts", "bridge.training.config"),
    ("bridge.training.config.derivation", "bridge.training.config.container"),
    ("bridge.training.config.provenance", "bridge.training.config.container"),
    ("bridge.gpt.families", "bridge.gpt.model_config"),
]
PACKAGES = ("bridge.training", "bridge.cli", "bridge.gpt", "bridge.mimo", "bridge.peft")


def test_no_imports_make_a_circle_those_for_types_alone_included() -> None:
    graph = grimp.build_graph("bridge", cache_dir=None)
    for folder, imported in TYPE_ONLY:
        edges = [
            (importer, found)
            for importer in {folder, *graph.find_descendants(folder)}
            for found in graph.find_modules_directly_imported_by(importer)
            if found == imported
        ]
        # What is listed is still there.
        assert edges
        for importer, found in edges:
            graph.remove_import(importer=importer, imported=found)
    folders = [m for m in graph.modules if m.startswith(PACKAGES) and graph.find_children(m)]
    circles = {folder: sorted(graph.nominate_cycle_breakers(folder)) for folder in folders}
    assert {folder: found for folder, found in circles.items() if found} == {}
