"""Between plain values (YAML, command line) and typed fields, led by the annotations.

`convert` is strict: a value either has the field's type, or is the one plain form of it.
`to_plain` is its inverse.
"""

import dataclasses
import enum
import functools
import inspect
import numbers
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import torch

from bridge.training.config.errors import ConversionError
from bridge.training.config.names import (
    dtype_from_name,
    dtype_name,
    function_from_name,
    import_by_name,
    name_of,
    nearest,
)

TARGET = "_target_"
"""The key beside a dataclass's fields that names its class, where the annotation does not."""


PARTIAL = "_partial_"
"""The key beside keyword arguments that names the function of a functools.partial."""


class FieldProblems(ConversionError):
    """Several fields of one nested dataclass are wrong; `lines` begin with their paths."""

    def __init__(self, lines: list[str]) -> None:
        """Keep one line for each field."""
        self.lines = lines
        super().__init__("\n".join(lines))


def is_runtime_hook(field: dataclasses.Field[Any]) -> bool:
    """Tell whether megatron-core's users fill this field while running, not in a file."""
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

    One that only a type checker can evaluate (its import stands under TYPE_CHECKING) is Any, and
    a field whose default is None takes None, whatever it says.
    """
    return _annotations_of(cls)


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
    """Tell whether the field holds its class's default (whatever its annotation says)."""
    default = default_of(field)
    return value is default or (type(value) is type(default) and bool(value == default))


# --- from plain values -----------------------------------------------------------------------


def convert(value: Any, annotation: Any, path: str) -> Any:
    """Return `value` as the annotation wants it.

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
        return _SCALARS[annotation](value)
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
        raise ConversionError(f"expected {describe_annotation(annotation)}, got {_show(value)}")
    return value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _convert_bool(value: Any) -> bool:
    return bool(_expect(isinstance(value, bool), value, bool))


def _convert_int(value: Any) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    whole = whole or (isinstance(value, float) and value.is_integer())
    return int(_expect(whole, value, int))


def _convert_float(value: Any) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(_expect(real, value, float))


def _convert_str(value: Any) -> str:
    result: str = _expect(isinstance(value, str), value, str)
    return result


def _convert_path(value: Any) -> pathlib.Path:
    return pathlib.Path(_expect(isinstance(value, str | pathlib.Path), value, pathlib.Path))


def _convert_dtype(value: Any) -> torch.dtype:
    if isinstance(value, str):
        return dtype_from_name(value)
    result: torch.dtype = _expect(isinstance(value, torch.dtype), value, torch.dtype)
    return result


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _convert_bool,
    int: _convert_int,
    float: _convert_float,
    str: _convert_str,
    pathlib.Path: _convert_path,
    torch.dtype: _convert_dtype,
}


def _convert_union(value: Any, annotation: Any, path: str) -> Any:
    members = get_args(annotation)
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    # A value that has one member's type already is that member, whatever the order.
    for member in members:
        if isinstance(member, type) and type(value) is member:
            return convert(value, member, path)
    errors = []
    for member in members:
        try:
            return convert(value, member, path)
        except ConversionError as error:
            errors.append(error)
    if len(errors) == 1 and not str(errors[0]).startswith("expected"):
        raise errors[0]
    raise ConversionError(f"expected {describe_annotation(annotation)}, got {_show(value)}")


def _convert_literal(value: Any, annotation: Any) -> Any:
    choices = get_args(annotation)
    for choice in choices:
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return value
    text = f"expected {describe_annotation(annotation)}, got {_show(value)}"
    hint = nearest(value, [c for c in choices if isinstance(c, str)]) if _is_str(value) else None
    raise ConversionError(text + (f"; did you mean {hint!r}?" if hint else ""))


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _convert_function(value: Any) -> Callable[..., Any]:
    if isinstance(value, str):
        return function_from_name(value)
    if isinstance(value, Mapping) and PARTIAL in value:
        keywords = {str(key): item for key, item in value.items() if key != PARTIAL}
        return functools.partial(_convert_function(value[PARTIAL]), **keywords)
    result: Callable[..., Any] = _expect(callable(value), value, Callable)
    return result


def _convert_to_class(value: Any, annotation: Any, kind: type, path: str) -> Any:
    if kind in (list, tuple, set, frozenset, dict) or kind in _ABSTRACT_CONTAINERS:
        return _convert_container(value, annotation, _ABSTRACT_CONTAINERS.get(kind, kind), path)
    if kind is type:
        found = import_by_name(value) if isinstance(value, str) else value
        return _expect(isinstance(found, type), value, annotation)
    if issubclass(kind, enum.Enum):
        return _convert_enum(value, kind)
    if isinstance(value, Mapping) and (dataclasses.is_dataclass(kind) or TARGET in value):
        return build_dataclass(kind, value, path)
    if _is_protocol(kind):
        return _convert_to_protocol(value, kind)
    return _expect(isinstance(value, kind), value, annotation)


def _is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def _convert_to_protocol(value: Any, kind: type) -> Any:
    members = {**vars(kind), **inspect.get_annotations(kind)}
    missing = [n for n in members if not n.startswith("_") and not hasattr(value, n)]
    if missing:
        raise ConversionError(
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
        raise ConversionError(f"{error} (at {path})") from error


def _convert_enum(value: Any, kind: type[enum.Enum]) -> enum.Enum:
    if isinstance(value, kind):
        return value
    names = list(kind.__members__)
    if isinstance(value, str) and value in names:
        return kind[value]
    raise ConversionError(f"expected one of {', '.join(names)}, got {_show(value)}")


def build_dataclass(kind: type, mapping: Mapping[Any, Any], path: str) -> Any:
    """Make an instance of `kind`, or of the class that `_target_` names, of a plain mapping.

    Raises:
        FieldProblems: With a line for each unknown key, wrong or missing value.
        ConversionError: The class cannot be had, or refuses the values.
    """
    cls = _target_class(kind, mapping)
    fields, annotations = fields_of(cls), annotations_of(cls)
    lines, values = [], {}
    for key, item in mapping.items():
        if key == TARGET:
            continue
        here = join(path, key)
        if key not in fields:
            hint = nearest(str(key), list(fields))
            meant = f"; did you mean {join(path, hint)}?" if hint else ""
            lines.append(f"{here}: unknown key{meant}")
            continue
        try:
            values[key] = convert(item, annotations[key], here)
        except FieldProblems as error:
            lines.extend(error.lines)
        except ConversionError as error:
            lines.append(f"{here}: {error}")
    for name, field in fields.items():
        if name not in mapping and field.init and default_of(field) is dataclasses.MISSING:
            lines.append(f"{join(path, name)}: has no value and no default")
    if lines:
        raise FieldProblems(lines)
    return _instantiate(cls, values)


def _target_class(kind: type, mapping: Mapping[Any, Any]) -> type:
    name = mapping.get(TARGET)
    if name is None:
        if not dataclasses.is_dataclass(kind):
            raise ConversionError(f"needs {TARGET}: the class to build, as package.module.Class")
        return kind
    cls = import_by_name(_convert_str(name))
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise ConversionError(
            f"{TARGET} {name!r} is not a dataclass, so it cannot be rebuilt from text; "
            "make it a dataclass, or set the object from Python"
        )
    if not _is_protocol(kind) and not issubclass(cls, kind):
        raise ConversionError(f"{TARGET} {name!r} is not a {kind.__name__}")
    return cls


def _instantiate(cls: type, values: dict[str, Any]) -> Any:
    fields = fields_of(cls)
    initial = {name: value for name, value in values.items() if fields[name].init}
    try:
        instance = cls(**initial)
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
        raise ConversionError(f"{cls.__name__} refuses these values: {error}") from error
    for name in values.keys() - initial.keys():
        object.__setattr__(instance, name, values[name])
    return instance


# --- to plain values -------------------------------------------------------------------------


def to_plain(value: Any, annotation: Any, path: str, *, brief: bool = False) -> Any:
    """Return `value` as YAML can hold it, such that `convert` gives it back.

    `brief` leaves out what stands in a megatron-core dataclass by default.

    Raises:
        FieldProblems: With a line for each value that cannot be written as text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    for plain_type in (int, float, str):
        if isinstance(value, plain_type):
            return plain_type(value)  # A subclass, such as NumPy's float64, is not plain.
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass_to_plain(value, annotation, path, brief)
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item, Any, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: to_plain(item, Any, f"{path}.{key}") for key, item in value.items()}
    try:
        if isinstance(value, functools.partial) and not value.args:
            keywords = {key: to_plain(v, Any, f"{path}.{key}") for key, v in value.keywords.items()}
            return {PARTIAL: name_of(value.func), **keywords}
        if callable(value):
            return name_of(value)
    except ConversionError as error:
        raise FieldProblems([f"{path}: {error}"]) from error
    raise FieldProblems(
        [f"{path}: {_show(value)} ({type(value).__name__}) cannot be written as text"]
    )


def _dataclass_to_plain(value: Any, annotation: Any, path: str, brief: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    lines = []
    if type(value) not in (annotation, *get_args(annotation)):
        plain[TARGET] = class_name(type(value))
    annotations = annotations_of(type(value))
    for name, field in fields_of(value).items():
        item = getattr(value, name)
        if item is None and is_runtime_hook(field):
            continue
        if brief and _is_megatrons(type(value), name) and is_default(item, field):
            continue
        try:
            plain[name] = to_plain(item, annotations[name], join(path, name), brief=brief)
        except FieldProblems as error:
            lines.extend(error.lines)
    if lines:
        raise FieldProblems(lines)
    return plain


def _is_megatrons(cls: type, name: str) -> bool:
    declaring = next(base for base in cls.__mro__ if name in inspect.get_annotations(base))
    return declaring.__module__.startswith("megatron.")


# --- in words --------------------------------------------------------------------------------

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
    """Say in a few words what a field accepts."""
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
