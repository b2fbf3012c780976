"""Limits on the names that a configuration file may have imported: files may come from anybody.

Importing a module runs it, and a function that is named may be called. A program and its recipes
may name anything. A file, such as the config.yaml of a checkpoint, may name

- anything in torch, megatron-core, bridge and packages with entry points of bridge,
- anything in modules of the program that it has imported already,
- classes of models and datasets (dataclasses with ``build``) that it has imported from installed
  packages.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from bridge.training.config.schema.errors import ConversionError
from bridge.training.entry_points import GROUPS

_ROOTS = frozenset({"torch", "megatron", "transformer_engine", "bridge"})

type _Names = Callable[[], Iterable[str]]

# None: no limits. Else the names that are allowed in addition.
_also_allowed: ContextVar[_Names | None] = ContextVar("_also_allowed", default=None)
_trusts_files: ContextVar[bool] = ContextVar("_trusts_files", default=False)


@contextlib.contextmanager
def limit_imports(also: _Names = tuple) -> Iterator[None]:
    """Limit the imports by name within the block.

    Args:
        also: Returns names that may be imported too; called when one is met that the rule forbids.
    """
    token = _also_allowed.set(None if _trusts_files.get() else also)
    try:
        yield
    finally:
        _also_allowed.reset(token)


@contextlib.contextmanager
def trust_files() -> Iterator[None]:
    """Lift the limits within the block, for files that this program or its parent wrote."""
    token = _trusts_files.set(True)
    try:
        yield
    finally:
        _trusts_files.reset(token)


def check_name(name: str) -> None:
    """Reject a name in a file that is not to be imported.

    Raises:
        ConversionError: With the remedy.
    """
    also = _also_allowed.get()
    if also is None:
        return
    root, *rest = name.split(".")
    is_plain = not any(part.startswith("__") for part in rest)
    if not (is_plain and _is_allowed(root, name)) and name not in also():
        raise _rejection(name)


def check_found(name: str, found: Any) -> None:
    """Reject an object of a forbidden module that an allowed name leads to.

    ``torch.os.system`` is not torch's.

    Raises:
        ConversionError: With the remedy.
    """
    also = _also_allowed.get()
    if also is not None and not _may_be_named(found) and name not in also():
        raise _rejection(name)


def _may_be_named(found: Any) -> bool:
    module = getattr(found, "__module__", None) or ""
    root = module.split(".")[0]
    if root == "torch" and not isinstance(found, type):
        # torch has more than functions of tensors, such as one that compiles and runs a file.
        is_operator = isinstance(found, types.BuiltinFunctionType) and hasattr(
            torch.Tensor, found.__name__
        )
        return is_operator or module.startswith(("torch.nn.", "torch._C._nn"))
    name = f"{module}.{getattr(found, '__qualname__', '')}"
    return _is_allowed(root, name)


def _is_allowed(root: str, name: str) -> bool:
    # The cheapest first.
    return (
        root in _ROOTS
        or _is_of_program(name)
        or _is_imported_section(name)
        or root in _packages_with_entry_points()
    )


def _rejection(name: str) -> ConversionError:
    return ConversionError(
        f"{name!r} is not imported, as a configuration file may come from anybody and importing "
        "runs code; give its package an entry point of bridge (bridge.recipes), import its module "
        "in your program before the file is read, or, if it is a function, name it on the command "
        "line (files may name functions of tensors in torch, and what megatron-core, bridge and "
        "packages with such entry points have)"
    )


def _packages_with_entry_points() -> set[str]:
    groups = {group.name for group in GROUPS}
    entries = (entry for entry in entry_points() if entry.group in groups)
    return {entry.module.split(".")[0] for entry in entries}


def _is_of_program(name: str) -> bool:
    """Whether a name is of a module that the program has imported and that is not installed."""
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names:
        return False
    modules = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    module = next((sys.modules[module] for module in modules if module in sys.modules), None)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return parts[0] == "__main__"
    return not {"site-packages", "dist-packages"}.intersection(Path(file).parts)


def _is_imported_section(name: str) -> bool:
    """Whether a name is of a section's class that the program has imported."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return isinstance(found, type) and is_dataclass(found) and hasattr(found, "build")
