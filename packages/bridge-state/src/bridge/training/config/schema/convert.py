"""Conversion of plain values (YAML, command line) to typed fields, by their annotations.

`convert` is strict: a value either has the field's type, or is the one plain form of it
(`to_plain` is its inverse).
"""

import dataclasses
import enum
import functools
import inspect
import numbers
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import torch

from bridge.training.config.schema.errors import ConversionError, FieldProblems, Problem, WrongType
from bridge.training.config.schema.fields import (
    PARTIAL,
    TARGET,
    annotations_of,
    default_of,
    describe_annotation,
    fields_of,
    join,
)
from bridge.training.config.schema.importable_names import (
    dtype_from_name,
    function_from_name,
    import_by_name,
)
from bridge.training.config.schema.megatron_errors import ERRORS, is_about_values, problem_of
from bridge.training.config.schema.peft_methods import class_of_section
from bridge.training.contracts import PEFTMethod
from bridge.training.spelling import did_you_mean, nearest


def convert(value: Any, annotation: Any, path: str) -> Any:
    """Return `value` converted to the annotated type.

    Args:
        value: A plain value, or one that has the type already.
        annotation: The evaluated annotation of the field.
        path: The field, such as "train.train_iters", for messages about nested values.

    Raises:
        ConversionError: The value does not fit; the text does not repeat `path`.
    """
    if annotation is Any:
        named = isinstance(value, Mapping) and TARGET in value
        return build_dataclass(object, value, path) if named else value
    if isinstance(annotation, typing.TypeAliasType):
        return convert(value, annotation.__value__, path)
    origin = get_origin(annotation)
    if origin is typing.Annotated or origin is typing.Final or origin is typing.ClassVar:
        return convert(value, get_args(annotation)[0], path)
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation, path)
    if origin is Literal:
        return _convert_literal(value, annotation)
    if annotation is None or annotation is type(None):
        return _expect(value is None, value, annotation)
    if annotation in _SCALARS:
        takes, make = _SCALARS[annotation]
        return make(_expect(takes(value), value, annotation))
    if annotation is torch.dtype:
        return _convert_dtype(value)
    kind = origin or annotation
    if kind is Callable:
        return _convert_function(value)
    if isinstance(kind, type):
        return _convert_to_class(value, annotation, kind, path)
    if isinstance(annotation, typing.TypeVar):
        return value
    raise ConversionError(f"has an annotation that is not supported: {annotation!r}")


def _expect(fits: bool, value: Any, annotation: Any) -> Any:
    if not fits:
        raise WrongType(f"expected {describe_annotation(annotation)}, got {_show(value)}")
    return value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _convert_dtype(value: Any) -> Any:
    if isinstance(value, str):
        return dtype_from_name(value)
    return _expect(isinstance(value, torch.dtype), value, torch.dtype)


def _is_integer(value: Any) -> bool:
    return (isinstance(value, numbers.Integral) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


_SCALARS: dict[Any, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    bool: (lambda value: isinstance(value, bool), bool),
    int: (_is_integer, int),
    float: (_is_number, float),
    str: (lambda value: isinstance(value, str), lambda value: value),
    pathlib.Path: (lambda value: isinstance(value, str | pathlib.Path), pathlib.Path),
}
"""For each type, whether it takes a value, and the conversion of such a value."""


def _convert_union(value: Any, annotation: Any, path: str) -> Any:
    members = get_args(annotation)
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    # A value that has one member's type already is that member, whatever the order.
    for member in members:
        if isinstance(member, type) and type(value) is member:
            return convert(value, member, path)
    errors, of_mappings = [], []
    for member in members:
        try:
            return convert(value, member, path)
        except ConversionError as error:
            errors.append(error)
            if isinstance(value, Mapping) and takes_mappings(member):
                of_mappings.append(error)
    if len(of_mappings) == 1:
        raise of_mappings[0]  # It names the wrong item.
    if len(errors) == 1 and not isinstance(errors[0], WrongType):
        raise errors[0]
    raise WrongType(f"expected {describe_annotation(annotation)}, got {_show(value)}")


def takes_mappings(annotation: Any) -> bool:
    """Whether the annotation, or a member of a union, is of mappings."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(takes_mappings(member) for member in get_args(annotation))
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, Mapping)


def _convert_literal(value: Any, annotation: Any) -> Any:
    choices = get_args(annotation)
    for choice in choices:
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return value
    names = [choice for choice in choices if isinstance(choice, str)]
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    raise WrongType(f"expected {describe_annotation(annotation)}, got {_show(value)}{hint}")


def _convert_function(value: Any) -> Any:
    if isinstance(value, str):
        return function_from_name(value)
    if isinstance(value, Mapping) and PARTIAL in value:
        keywords = {str(key): item for key, item in value.items() if key != PARTIAL}
        return functools.partial(_convert_function(value[PARTIAL]), **keywords)
    return _expect(callable(value), value, Callable)


def _convert_to_class(value: Any, annotation: Any, kind: type, path: str) -> Any:
    if kind in (list, tuple, set, frozenset, dict) or kind in _ABSTRACT_CONTAINERS:
        return _convert_container(value, annotation, _ABSTRACT_CONTAINERS.get(kind, kind), path)
    if kind is type:
        found = import_by_name(value) if isinstance(value, str) else value
        _expect(isinstance(found, type), value, annotation)
        return found
    if issubclass(kind, enum.Enum):
        return _convert_enum(value, kind)
    if isinstance(value, Mapping) and (
        dataclasses.is_dataclass(kind) or TARGET in value or kind is PEFTMethod
    ):
        value = build_dataclass(kind, value, path)
    if _is_protocol(kind):
        return _convert_to_protocol(value, kind)
    return _expect(isinstance(value, kind), value, annotation)


def _is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def _convert_to_protocol(value: Any, kind: type) -> Any:
    members = {**vars(kind), **inspect.get_annotations(kind)}
    missing = [n for n in members if not n.startswith("_") and not hasattr(value, n)]
    if missing:
        raise WrongType(
            f"expected a {kind.__name__}, got {_show(value)}, which has no {', '.join(missing)}"
        )
    return value


_ABSTRACT_CONTAINERS: dict[type, type] = {Sequence: list, Iterable: list, Mapping: dict}


def _convert_container(value: Any, annotation: Any, kind: type, path: str) -> Any:
    arguments = get_args(annotation)
    if kind is dict:
        _expect(isinstance(value, Mapping), value, annotation)
        key_type, value_type = arguments or (Any, Any)
        return {
            convert(key, key_type, path): _convert_item(item, value_type, f"{path}.{key}")
            for key, item in value.items()
        }
    _expect(isinstance(value, list | tuple | set | frozenset), value, annotation)
    items = list(value)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        _expect(len(items) == len(arguments), value, annotation)
        item_types = list(arguments)
    else:
        item_types = [arguments[0] if arguments else Any] * len(items)
    return kind(
        _convert_item(item, item_type, f"{path}[{index}]")
        for index, (item, item_type) in enumerate(zip(items, item_types, strict=True))
    )


def _convert_item(value: Any, annotation: Any, path: str) -> Any:
    try:
        return convert(value, annotation, path)
    except FieldProblems:
        raise
    except ConversionError as error:
        raise type(error)(f"{error} (at {path})") from error


def _convert_enum(value: Any, kind: type[enum.Enum]) -> enum.Enum:
    if isinstance(value, kind):
        return value
    names = list(kind.__members__)
    if isinstance(value, str) and value in names:
        return kind[value]
    raise WrongType(f"expected one of {', '.join(names)}, got {_show(value)}")


def build_dataclass(kind: type, mapping: Mapping[Any, Any], path: str) -> Any:
    """Build an instance of `kind`, or of the class that `_target_` names, from a plain mapping.

    Raises:
        FieldProblems: With a problem for each unknown key, wrong or missing value.
        ConversionError: The class cannot be found, or rejects the values.
    """
    cls = _target_class(kind, mapping)
    fields, annotations = fields_of(cls), annotations_of(cls)
    problems: list[Problem] = []
    values = {}
    for key, item in mapping.items():
        if key == TARGET:
            continue
        here = join(path, key)
        if key not in fields:
            hint = nearest(str(key), fields)
            meant = f"; did you mean {join(path, hint)}?" if hint else ""
            problems.append(Problem((here,), f"{here}: unknown key{meant}"))
            continue
        try:
            values[key] = convert(item, annotations[key], here)
        except ConversionError as error:
            problems += error.as_problems(here)
    for name, field in fields.items():
        if name not in mapping and field.init and default_of(field) is dataclasses.MISSING:
            here = join(path, name)
            problems.append(Problem((here,), f"{here}: has no value and no default"))
    if problems:
        raise FieldProblems(problems)
    return _instantiate(cls, values, path)


def _target_class(kind: type, mapping: Mapping[Any, Any]) -> type:
    name = mapping.get(TARGET)
    if name is None:
        if found := class_of_section(kind, mapping):
            return found
        if not dataclasses.is_dataclass(kind):
            raise ConversionError(f"needs {TARGET}: the class to build, as package.module.Class")
        return kind
    cls = import_by_name(convert(name, str, TARGET))
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise ConversionError(
            f"{TARGET} {name!r} is not a dataclass, so it cannot be rebuilt from text; "
            "make it a dataclass, or set the object from Python"
        )
    if not _is_protocol(kind) and not issubclass(cls, kind):
        raise ConversionError(f"{TARGET} {name!r} is not a {kind.__name__}")
    return cls


def _instantiate(cls: type, values: dict[str, Any], path: str) -> Any:
    fields = fields_of(cls)
    initial = {name: value for name, value in values.items() if fields[name].init}
    try:
        instance = cls(**initial)
    except ERRORS as error:
        if cls.__module__.startswith("megatron."):
            unchecked = _unchecked(cls, initial)
            problem = problem_of(error, unchecked, path, dataclasses.replace)
            raise FieldProblems([problem]) from error
        if not is_about_values(error):
            error.add_note(f"while making a {cls.__name__} of the configuration")
            raise
        raise ConversionError(f"{cls.__name__} rejects these values: {error}") from error
    for name in values.keys() - initial.keys():
        object.__setattr__(instance, name, values[name])
    return instance


def _unchecked(cls: type, values: Mapping[str, Any]) -> Any:
    """Return an instance of the class with these values, without its checks."""
    instance: Any = object.__new__(cls)
    for name, field in fields_of(cls).items():
        object.__setattr__(instance, name, values.get(name, default_of(field)))
    return instance
