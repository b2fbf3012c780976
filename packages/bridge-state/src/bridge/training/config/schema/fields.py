"""Fields of dataclasses: their annotations, defaults and descriptions, and paths to them.

A path goes through the dataclasses in fields, and through mappings by name:
"model.encoders.vision.num_layers" is a field of the dataclass that the mapping ``model.encoders``
has under "vision".
"""

import dataclasses
import enum
import functools
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import torch

TARGET = "_target_"
"""The key next to a dataclass's fields that names its class, where the annotation does not."""

PARTIAL = "_partial_"
"""The key next to keyword arguments that names the function of a functools.partial."""


def is_runtime_hook(field: dataclasses.Field[Any]) -> bool:
    """Whether megatron-core's users set this field while running, not in a file."""
    return field.name in _RUNTIME_HOOKS or field.name.startswith("_")


_RUNTIME_HOOKS = frozenset(
    {
        "timers",
        "finalize_model_grads_func",
        "grad_scale_func",
        "moe_grad_scale_func",
        "mtp_grad_scale_func",
        "no_sync_func",
        "grad_sync_func",
        "param_sync_func",
        "experimental_attention_variant_loss_scale_func",
    }
)


def class_name(cls: type) -> str:
    """Return the name under which `_target_` records a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def join(path: str, key: Any) -> str:
    """Return the path of a field of the dataclass at `path` ("" is the container)."""
    return f"{path}.{key}" if path else str(key)


def annotations_of(cls: type) -> dict[str, Any]:
    """Return the evaluated annotation of each field of a dataclass.

    One that only a type checker can evaluate (its import is under TYPE_CHECKING) is Any. A field
    whose default is None takes None, whatever its annotation says.
    """
    return _annotations_of(cls)


# To mypy a cached function takes no type[Any], which it holds for not hashable.
@functools.cache
def _annotations_of(cls: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls)
    except NameError:
        hints = {}
        for base in reversed(cls.__mro__):
            hints.update(_hints_one_by_one(base))
    return {
        field.name: hints.get(field.name, Any) | None
        if field.default is None
        else hints.get(field.name, Any)
        for field in dataclasses.fields(cls)
    }


def _hints_one_by_one(cls: type) -> Iterator[tuple[str, Any]]:
    for name, annotation in inspect.get_annotations(cls).items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        module = inspect.getmodule(cls)
        try:
            hints = typing.get_type_hints(holder, vars(module) if module else {}, dict(vars(cls)))
        except NameError:
            yield name, Any
        else:
            yield name, hints[name]


def fields_of(thing: Any) -> dict[str, dataclasses.Field[Any]]:
    """Return the public fields of a dataclass or of its instance, by name."""
    return {f.name: f for f in dataclasses.fields(thing) if not f.name.startswith("_")}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the field's default, or dataclasses.MISSING."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether the field has its class's default (whatever its annotation says)."""
    default = default_of(field)
    return value is default or (type(value) is type(default) and bool(value == default))


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    pathlib.Path: "a path",
    torch.dtype: "a dtype",
    type(None): "null",
    None: "null",
    Any: "anything",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    Callable: "a function's name",
}


def describe_annotation(annotation: Any) -> str:
    """Return a short description of the values that a field accepts."""
    if isinstance(annotation, typing.TypeAliasType):
        return describe_annotation(annotation.__value__)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_annotation(member) for member in arguments))
    if origin is Literal:
        shown = [choice if isinstance(choice, str) else repr(choice) for choice in arguments]
        return shown[0] if len(shown) == 1 else "one of " + ", ".join(shown)
    if origin in (list, tuple) and arguments:
        kinds = dict.fromkeys(describe_annotation(a) for a in arguments if a is not Ellipsis)
        length = f" of {len(arguments)}" if origin is tuple and Ellipsis not in arguments else ""
        return f"a list{length} ({', '.join(kinds)})"
    if origin is not None and origin in _WORDS:
        return _WORDS[origin]
    if annotation in _WORDS:
        return _WORDS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(annotation.__members__)
    return getattr(annotation, "__name__", str(annotation))


def is_dataclass_instance(thing: Any) -> bool:
    """Whether `thing` has fields with values."""
    return dataclasses.is_dataclass(thing) and not isinstance(thing, type)


def parts_of(holder: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dataclass at `path` and every one within it, each with its path."""
    if is_dataclass_instance(holder):
        yield path, holder
        for name in fields_of(holder):
            yield from parts_of(getattr(holder, name), join(path, name))
    elif isinstance(holder, Mapping):
        for key, item in holder.items():
            yield from parts_of(item, join(path, key))


def names_in(holder: Any) -> list[str]:
    """Return the fields of a dataclass or the keys of a mapping."""
    if isinstance(holder, Mapping):
        return [str(key) for key in holder]
    return list(fields_of(holder)) if dataclasses.is_dataclass(holder) else []


def step_into(holder: Any, name: str) -> Any:
    """Return the value of a field, or of a key of a mapping.

    Raises:
        KeyError: There is none.
    """
    if name not in names_in(holder):
        raise KeyError(name)
    return holder[name] if isinstance(holder, Mapping) else getattr(holder, name)


def value_at(holder: Any, path: str) -> Any:
    """Return the value at `path` below `holder`.

    Raises:
        KeyError: A part of the path does not exist.
    """
    for name in path.split("."):
        holder = step_into(holder, name)
    return holder


def exists(holder: Any, path: str) -> bool:
    """Whether `path` leads to a value below `holder`, None included."""
    try:
        value_at(holder, path)
    except KeyError:
        return False
    return True


def is_within(path: str, place: str) -> bool:
    """Whether `path` leads to something below `place`."""
    return path.startswith(f"{place}.")


def item_annotation(annotation: Any) -> Any:
    """Return the annotation of a mapping's values, as ``dict[str, int] | None`` says; else Any."""
    for candidate in (annotation, *get_args(annotation)):
        origin = get_origin(candidate)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return get_args(candidate)[1]
    return Any
