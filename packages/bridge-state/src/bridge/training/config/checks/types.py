"""Finds values that Python code assigned to fields of another type, or to no field at all."""

import dataclasses
from typing import Any

from bridge.training.config.checks.suggestions import unknown_key
from bridge.training.config.container import SECTIONS, ConfigContainer
from bridge.training.config.schema.convert import convert
from bridge.training.config.schema.errors import ConversionError, FieldProblems
from bridge.training.config.schema.fields import (
    annotations_of,
    default_of,
    fields_of,
    is_default,
    join,
)
from bridge.training.config.schema.paths import parts_of


def check_types(config: ConfigContainer) -> tuple[list[str], set[str]]:
    """Convert every value of `config` to its field's type, in place.

    Returns:
        A line for each that does not fit, and the paths of those. They hold their class's default
        afterwards, so that what depends on other fields can be checked still.
    """
    problems: list[str] = []
    refused: set[str] = set()
    _check_fields(config, "", config, problems, refused)
    for name in SECTIONS:
        # A field's value is replaced before the parts within it are looked at.
        for path, part in parts_of(getattr(config, name), name):
            _check_fields(part, path, config, problems, refused)
    return problems, refused


def _check_fields(
    holder: Any, path: str, config: ConfigContainer, problems: list[str], refused: set[str]
) -> None:
    annotations = annotations_of(type(holder))
    for name, field in fields_of(holder).items():
        here = join(path, name)
        value = getattr(holder, name)
        try:
            converted = convert(value, annotations[name], here)
        except ConversionError as error:
            if is_default(value, field):
                continue  # megatron-core's own annotation does not fit its default.
            problems.extend(
                error.lines if isinstance(error, FieldProblems) else [f"{here}: {error}"]
            )
            refused.add(here)
            default = default_of(field)
            if default is not dataclasses.MISSING:
                assign(holder, name, default)
        else:
            if converted is not value:
                assign(holder, name, converted)
    for name in _stray_attributes(holder):
        problems.append(unknown_key(config, join(path, name)))


def assign(holder: Any, name: str, value: Any) -> None:
    """Set a field of a dataclass that nobody else holds, even of a frozen one."""
    object.__setattr__(holder, name, value)


def _stray_attributes(holder: Any) -> list[str]:
    """Return attributes that are no fields, nor the class's own doing: misspelt, most probably."""
    known = {field.name for field in dataclasses.fields(holder)}
    for cls in type(holder).__mro__:
        code = getattr(vars(cls).get("__post_init__"), "__code__", None)
        known.update(code.co_names if code else ())
    return [
        name
        for name in getattr(holder, "__dict__", {})
        if name not in known and not name.startswith("_") and not hasattr(type(holder), name)
    ]
