"""Private names of megatron-core and torch are used in one module, which says why."""

import ast
import contextlib
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.training.megatron_patches import MEGATRON_CORE

PACKAGES = Path(__file__).resolve().parents[2] / "packages"
SEAM = PACKAGES / "bridge-state/src/bridge/training/megatron_patches.py"
ELSEWHERE = (
    "bridge/peft/private_names.py",
    # The CPU emulation, and what holds while megatron-core is imported.
    "bridge/training/cpu/",
    "bridge/training/megatron_import.py",
)
PATCHED = {"megatron", "torch", "transformer_engine", "pickle", "multiprocessing"}
OF_PYTHON = {"os", "sys", "argparse"}


def foreign_private_names(tree: ast.Module) -> Iterator[str]:
    """Yield "line: code" for what a module imports, reads or sets that another package owns.

    An attribute with a leading underscore is another's if the module itself defines none of that
    name. An override that calls the method it overrides is left to `overridden_private_methods`.
    """
    defined, packages = _defined_names(tree), _imported_packages(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                is_foreign = any(_leads_to_private(alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                is_foreign = any(_leads_to_private(f"{module}.{alias.name}") for alias in names)
            case ast.Attribute(attr=name, value=value):
                package = packages.get(_first_name(value))
                is_patch = isinstance(node.ctx, ast.Store) and package in PATCHED
                is_used = _is_private(name) and name not in defined and package not in OF_PYTHON
                is_foreign = is_patch or is_used
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                is_foreign = _is_private(name) and name not in defined
            case _:
                continue
        if is_foreign:
            yield f"{node.lineno}: {ast.unparse(node)}"


def _defined_names(tree: ast.Module) -> set[str]:
    names = set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def _imported_packages(tree: ast.Module) -> dict[str, str]:
    """Return the package that each imported name comes from."""
    packages = dict[str, str]()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                packages |= {(a.asname or _package(a.name)): _package(a.name) for a in names}
            case ast.ImportFrom(module=str(module), names=names):
                packages |= {(a.asname or a.name): _package(module) for a in names}
    return packages


def overridden_private_methods(tree: ast.Module, module: str) -> Iterator[str]:
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for owner in classes:
        for method in owner.body:
            if isinstance(method, ast.FunctionDef) and _is_private(method.name):
                if "override" in {ast.unparse(mark) for mark in method.decorator_list}:
                    yield f"{module}.{owner.name}.{method.name}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _leads_to_private(path: str) -> bool:
    return _package(path) in PATCHED and any(map(_is_private, path.split(".")))


def _package(path: str) -> str:
    return path.partition(".")[0]


def _first_name(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGES.glob("*/src/**/*.py")):
        if path != SEAM:
            name = path.relative_to(path.parents[path.parts[::-1].index("src") - 1]).as_posix()
            yield name, ast.parse(path.read_text())


def _names_in_the_docstring() -> list[str]:
    docstring = ast.get_docstring(ast.parse(SEAM.read_text())) or ""
    return re.findall(r"`(bridge\.[\w.]+)`", docstring)


def _exists(name: str) -> bool:
    """Whether there is a module, or a class or method in a module, of this dotted name."""
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(name) is not None:
            return True
    owner, _, attribute = name.rpartition(".")
    with contextlib.suppress(ModuleNotFoundError):
        return hasattr(importlib.import_module(owner), attribute)
    module, _, class_name = owner.rpartition(".")
    return hasattr(getattr(importlib.import_module(module), class_name, None), attribute)


def test_private_names_of_megatron_core_and_torch_are_in_one_module() -> None:
    found = [
        f"{name}:{line}"
        for name, tree in _sources()
        if not name.startswith(ELSEWHERE)
        for line in foreign_private_names(tree)
    ]
    assert found == []


def test_the_module_lists_the_private_methods_that_are_overridden() -> None:
    methods = {
        method
        for name, tree in _sources()
        for method in overridden_private_methods(tree, name.removesuffix(".py").replace("/", "."))
    }
    assert methods
    assert methods - set(_names_in_the_docstring()) == set()


def test_what_the_module_names_exists() -> None:
    assert [name for name in _names_in_the_docstring() if not _exists(name)] == []


@pytest.mark.parametrize(
    "code",
    [
        "from torch.utils.data._utils import signal_handling",
        "from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available",
        "import torch._dynamo",
        "import torch\ntorch._assert_async(x)",
        "import torch\ntorch.compile = None",
        "from megatron.core import parallel_state as state\nstate.get_rank = None",
        "iterator._shutdown_workers()",
        "class Own(Base):\n    def own(self):\n        return self._of_base",
        "getattr(tokenizer, '_tokenizer')",
        "setattr(writer, '_results_queue', None)",
    ],
)
def test_a_private_name_elsewhere_is_found(code: str) -> None:
    assert len(list(foreign_private_names(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(1)",
        "import torch\ntorch.compile(x)\ntorch.__version__",
        "class Own:\n    def __init__(self):\n        self._own = 1\n    def own(self, other):\n"
        "        return other._own",
    ],
)
def test_own_and_public_names_are_left_alone(code: str) -> None:
    assert list(foreign_private_names(ast.parse(code))) == []


def test_the_version_is_the_one_that_every_package_requires() -> None:
    texts = [path.read_text() for path in PACKAGES.glob("*/pyproject.toml")]
    pins = {pin for text in texts for pin in re.findall(r'"megatron-core==(.*)"', text)}
    assert pins == {MEGATRON_CORE}
