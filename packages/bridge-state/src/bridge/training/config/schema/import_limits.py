"""Limits on the names that a configuration file has imported: files may come from anybody.

Importing a module runs it, and a function that is named may be called. A program and its recipes
may name anything; a file, such as the config.yaml of a checkpoint, may name what torch,
megatron-core, bridge and packages with entry points of bridge offer, and what the program has
imported already: anything from modules of its own, and classes of models and datasets (dataclasses
with ``build``) from installed packages too.
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

# None: whatever is named is imported. Else what may be named on top of the rule.
_also_allowed: ContextVar[_Names | None] = ContextVar("_also_allowed", default=None)
_trusts_files: ContextVar[bool] = ContextVar("_trusts_files", default=False)


@contextlib.contextmanager
def names_of_a_file(also: _Names = tuple) -> Iterator[None]:
    """Limit what is imported by name within the block.

    Args:
        also: Returns names that may be imported too; called when one is met that the rule forbids.
    """
    token = _also_allowed.set(None if _trusts_files.get() else also)
    try:
        yield
    finally:
        _also_allowed.reset(token)


@contextlib.contextmanager
def files_of_this_program() -> Iterator[None]:
    """Read files within the block that this program, or the one that started it, has written."""
    token = _trusts_files.set(True)
    try:
        yield
    finally:
        _trusts_files.reset(token)


def check_name(name: str) -> None:
    """Reject a name that is not to be imported because a file has it.

    Raises:
        ConversionError: With what can be done.
    """
    also = _also_allowed.get()
    if also is None:
        return
    root, *rest = name.split(".")
    is_plain = not any(part.startswith("__") for part in rest)
    if not (is_plain and _is_allowed(root, name)) and name not in also():
        raise _rejection(name)


def check_found(name: str, found: Any) -> None:
    """Reject what an allowed name leads to, if it is of a module that may not be named.

    ``torch.os.system`` is not torch's.

    Raises:
        ConversionError: With what can be done.
    """
    also = _also_allowed.get()
    if also is not None and not _may_be_named(found) and name not in also():
        raise _rejection(name)


def _may_be_named(found: Any) -> bool:
    module = getattr(found, "__module__", None) or ""
    root = module.split(".")[0]
    if root == "torch" and not isinstance(found, type):
        # There is more in torch than functions of tensors, such as what compiles and runs a file.
        is_operator = isinstance(found, types.BuiltinFunctionType) and hasattr(
            torch.Tensor, found.__name__
        )
        return is_operator or module.startswith(("torch.nn.", "torch._C._nn"))
    name = f"{module}.{getattr(found, '__qualname__', '')}"
    return _is_allowed(root, name)


def _is_allowed(root: str, name: str) -> bool:
    # In the order of what they cost.
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
    """Whether a name is of a module that the program has imported, and that nobody installed."""
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
    """Whether a name is of a section's class that the program has imported from anywhere."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return isinstance(found, type) and is_dataclass(found) and hasattr(found, "build")
