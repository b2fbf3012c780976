"""Values that a field does not take: wrong types, URLs, attributes that are not fields."""

import dataclasses
from typing import Any

from bridge.training.config.checks.suggestions import unknown_key
from bridge.training.config.container import ConfigContainer
from bridge.training.config.schema.convert import convert
from bridge.training.config.schema.errors import ConversionError, Problem
from bridge.training.config.schema.fields import (
    annotations_of,
    default_of,
    fields_of,
    is_default,
    join,
    parts_of,
)
from bridge.training.local_paths import holds_local_paths, url_problem, urls_in


def check_types(config: ConfigContainer) -> tuple[list[Problem], set[str]]:
    """Convert every value of `config` to its field's type, in place.

    Returns:
        A problem for each that does not fit, and the paths of those. They have their class's
        default afterwards, so that the other checks can run.
    """
    problems: list[Problem] = []
    rejected: set[str] = set()
    # A field's value is replaced before the parts within it are checked.
    for path, part in parts_of(config, ""):
        _check_fields(part, path, config, problems, rejected)
    return problems, rejected


def url_problems(config: ConfigContainer) -> list[Problem]:
    """Return a problem for each URL in a field that takes paths of this machine."""
    return [
        Problem((place,), url_problem(place, url))
        for path, part in parts_of(config, "")
        for name, field in fields_of(part).items()
        if holds_local_paths(field)
        for place, url in urls_in(getattr(part, name), join(path, name))
    ]


def _check_fields(
    holder: Any, path: str, config: ConfigContainer, problems: list[Problem], rejected: set[str]
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
            problems += error.as_problems(here)
            rejected.add(here)
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
    """Return the attributes that are neither fields nor set by the class: probably misspelled."""
    known = {field.name for field in dataclasses.fields(holder)}
    for cls in type(holder).__mro__:
        code = getattr(vars(cls).get("__post_init__"), "__code__", None)
        known.update(code.co_names if code else ())
    return [
        name
        for name in getattr(holder, "__dict__", {})
        if name not in known and not name.startswith("_") and not hasattr(type(holder), name)
    ]
