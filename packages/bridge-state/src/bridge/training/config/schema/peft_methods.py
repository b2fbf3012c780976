"""PEFT methods: the class of the section ``peft`` by ``peft.method``, from installed packages."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from bridge.training.config.schema.errors import ConversionError
from bridge.training.config.schema.fields import default_of, fields_of
from bridge.training.contracts import PEFTMethod
from bridge.training.entry_points import PEFT_METHODS
from bridge.training.usage_error import UsageError

METHOD = "method"
"""The field of the section that names its class."""


def method_names() -> list[str]:
    """Return the methods of the installed packages."""
    return list(PEFT_METHODS.entries())


def method_class(name: Any) -> type:
    """Return the dataclass that an installed package offers under `name`.

    Raises:
        ConversionError: There is none; the message lists the methods, or a package to install.
    """
    try:
        cls: type = PEFT_METHODS.find(str(name))
    except UsageError as error:
        raise ConversionError(str(error)) from error
    return cls


def class_of_section(kind: type, content: Mapping[Any, Any]) -> type | None:
    """Return the class of a section that is found by name; None for other annotations.

    Args:
        kind: The section's annotation.
        content: Its fields.

    Raises:
        ConversionError: The method is not named, or there is none of that name.
    """
    if kind is not PEFTMethod:
        return None
    if METHOD not in content:
        raise ConversionError(f"needs {METHOD}: one of {', '.join(method_names())}")
    try:
        return method_class(content[METHOD])
    except ConversionError as error:
        raise ConversionError(f"{METHOD}: {error}") from error


def is_found_by_name(value: Any, annotation: Any) -> bool:
    """Whether a section is written without its class, since its field ``method`` leads to it."""
    if PEFTMethod not in (annotation, *get_args(annotation)):
        return False
    entry = PEFT_METHODS.entries().get(getattr(value, METHOD, ""))
    return entry is not None and entry.load() is type(value)


def changed_method(present: Any, cls: type) -> Any:
    """Return a section of another method with the fields that both have and that were set.

    Args:
        present: The present section, None if there is none.
        cls: The class of the new one.
    """
    if type(present) is cls:
        return present
    made = cls()
    if dataclasses.is_dataclass(present):
        for name in fields_of(present).keys() & fields_of(cls).keys() - {METHOD}:
            value = getattr(present, name)
            if value != default_of(fields_of(present)[name]):
                setattr(made, name, value)
    return made
