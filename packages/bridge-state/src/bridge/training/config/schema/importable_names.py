"""Functions, classes and dtypes by name, and their names."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu, squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu

from bridge.training.config.schema.errors import ConversionError
from bridge.training.config.schema.import_limits import check_found, check_name
from bridge.training.spelling import did_you_mean

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    # The one that TransformerConfig compares with, not its namesake in megatron.core.activations.
    "quick_gelu": quick_gelu,
    "fast_gelu": fast_gelu,
    "squared_relu": squared_relu,
}
INITIALIZERS: dict[str, Callable[..., Any]] = {
    name: getattr(torch.nn.init, f"{name}_")
    for name in (
        "zeros ones normal trunc_normal uniform xavier_normal xavier_uniform kaiming_normal "
        "kaiming_uniform orthogonal"
    ).split()
}
_FUNCTIONS = {**ACTIVATIONS, **INITIALIZERS}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)} | {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def dtype_from_name(name: str) -> torch.dtype:
    """Return torch's dtype for 'bfloat16', 'bf16' or 'torch.bfloat16'."""
    short = name.removeprefix("torch.")
    if short not in _DTYPES:
        raise ConversionError(f"{name!r} is not a torch dtype{did_you_mean(short, _DTYPES)}")
    return _DTYPES[short]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's own name, such as 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def function_from_name(name: str) -> Any:
    """Return the activation, initializer or 'package.module.function' called `name`."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if "." not in name:
        raise ConversionError(
            f"{name!r} is not a known function{did_you_mean(name, _FUNCTIONS)} (known: "
            f"{', '.join(ACTIVATIONS)}; initializers: {', '.join(INITIALIZERS)}; any other as "
            "'package.module.function')"
        )
    found = import_by_name(name)
    if not callable(found):
        raise ConversionError(f"{name!r} is {type(found).__name__}, not a function")
    return found


def import_by_name(name: str) -> Any:
    """Import 'package.module.Name', or a name nested in a class.

    Raises:
        ConversionError: There is no such module or no such name in it, or a file names what it may
            not.
    """
    check_name(name)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConversionError(f"{name!r} is no name of a class or function, package.module.Name")
    found = _import(name)
    check_found(name, found)
    return found


def _import(name: str) -> Any:
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            # Only the module asked for may be absent, not one that it imports.
            is_absent = isinstance(error, ModuleNotFoundError) and error.name is not None
            if is_absent and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise ConversionError(f"importing {name!r} failed: {error}") from error
        try:
            return functools.reduce(getattr, parts[length:], module)
        except AttributeError as error:
            raise ConversionError(f"{name!r} does not exist: {error}") from error
    raise ConversionError(f"{name!r} cannot be imported: there is no module {parts[0]!r}")


def name_of(thing: Any) -> str:
    """Return a name that `function_from_name` or `import_by_name` leads back to `thing`.

    Raises:
        ConversionError: It has none (a lambda, a partial, a function within a function).
    """
    for name, function in _FUNCTIONS.items():
        if function is thing:
            return name
    module, qualified_name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    no_name = ConversionError(
        f"{thing!r} has no name to write; define it at the top level of a module"
    )
    if not module or not qualified_name or "<" in qualified_name:
        raise no_name
    name = f"{module}.{qualified_name}"
    try:
        found = _import(name)
    except ConversionError:
        raise no_name from None
    if found is not thing:
        raise no_name
    return name
