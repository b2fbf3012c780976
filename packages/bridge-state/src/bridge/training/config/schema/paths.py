"""Dotted paths, through the dataclasses in a section's fields and in mappings by name.

"model.encoders.vision.num_layers" is a field of the dataclass that the mapping ``model.encoders``
has under "vision".
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from bridge.training.config.schema.fields import fields_of, join


def is_dataclass_instance(thing: Any) -> bool:
    """Whether `thing` has fields with values."""
    return dataclasses.is_dataclass(thing) and not isinstance(thing, type)


def parts_of(holder: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dataclass at `path` and every one within it, each with its path."""
    if is_dataclass_instance(holder):
        yield path, holder
        for name in fields_of(holder):
            yield from _parts_of_value(getattr(holder, name), join(path, name))


def _parts_of_value(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts_of_value(item, join(path, key))
    else:
        yield from parts_of(value, path)


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
