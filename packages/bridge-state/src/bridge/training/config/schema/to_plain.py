"""Typed fields as plain values, the inverse of `convert`."""

import enum
import functools
import inspect
import pathlib
from collections.abc import Mapping
from typing import Any, get_args

import torch

from bridge.training.config.schema.errors import ConversionError, FieldProblems, Problem
from bridge.training.config.schema.fields import (
    PARTIAL,
    TARGET,
    annotations_of,
    class_name,
    fields_of,
    is_dataclass_instance,
    is_default,
    is_runtime_hook,
    item_annotation,
    join,
)
from bridge.training.config.schema.importable_names import dtype_name, name_of
from bridge.training.config.schema.peft_methods import is_found_by_name


def to_plain(value: Any, annotation: Any, path: str, *, brief: bool = False) -> Any:
    """Return `value` in YAML's types, such that `convert` gives it back.

    `brief` leaves out the fields of megatron-core's dataclasses that have their default.

    Raises:
        FieldProblems: With a problem for each value that cannot be written as text.
    """
    if value is None or isinstance(value, _SCALARS):
        return _scalar_to_plain(value)
    if is_dataclass_instance(value):
        return _dataclass_to_plain(value, annotation, path, brief)
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item, Any, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        kind = item_annotation(annotation)
        return {k: to_plain(item, kind, f"{path}.{k}", brief=brief) for k, item in value.items()}
    try:
        if isinstance(value, functools.partial) and not value.args:
            keywords = {key: to_plain(v, Any, f"{path}.{key}") for key, v in value.keywords.items()}
            return {PARTIAL: name_of(value.func), **keywords}
        if callable(value):
            return name_of(value)
    except ConversionError as error:
        raise FieldProblems(error.as_problems(path)) from error
    text = f"{path}: {value!r} ({type(value).__name__}) cannot be written as text"
    raise FieldProblems([Problem((path,), text)])


def _dataclass_to_plain(value: Any, annotation: Any, path: str, brief: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    problems: list[Problem] = []
    is_declared = type(value) in (annotation, *get_args(annotation))
    if not is_declared and not is_found_by_name(value, annotation):
        plain[TARGET] = class_name(type(value))
    annotations = annotations_of(type(value))
    for name, field in fields_of(value).items():
        item = getattr(value, name)
        # A section that is its model's own config has the loop's hooks while it trains.
        if is_runtime_hook(field) and (item is None or callable(item)):
            continue
        if brief and _is_megatrons(type(value), name) and is_default(item, field):
            continue
        try:
            plain[name] = to_plain(item, annotations[name], join(path, name), brief=brief)
        except FieldProblems as error:
            problems.extend(error.problems)
    if problems:
        raise FieldProblems(problems)
    return plain


def _is_megatrons(cls: type, name: str) -> bool:
    declaring = next(base for base in cls.__mro__ if name in inspect.get_annotations(base))
    return declaring.__module__.startswith("megatron.")


_SCALARS = (bool, enum.Enum, int, float, str, torch.dtype, pathlib.PurePath)


def _scalar_to_plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    for plain_type in (int, float):
        if isinstance(value, plain_type):
            return plain_type(value)  # A subclass, such as NumPy's float64, is not plain.
    return str(value)


def text_of(value: Any) -> str:
    """Return a value as an override would write it."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{','.join(map(text_of, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
