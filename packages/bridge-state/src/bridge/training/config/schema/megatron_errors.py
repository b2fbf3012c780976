"""Errors that megatron-core's dataclasses raise, as problems of the fields that cause them."""

import copy
import dataclasses
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bridge.training.config.schema.errors import Problem
from bridge.training.config.schema.fields import default_of, fields_of, is_runtime_hook, join
from bridge.training.config.schema.to_plain import text_of
from bridge.training.usage_error import is_usage_error

ERRORS = (ValueError, AssertionError, RuntimeError, TypeError, ZeroDivisionError, ImportError)
"""The types of these errors."""

_WITHOUT_DEFAULT = frozenset({"num_layers", "hidden_size", "num_attention_heads"})
"""Sizes of a transformer whose default is 0, with which no other check passes."""

_MANY = 3
"""The most fields that a problem names in addition to the first."""


def problem_of(error: Exception, section: Any, path: str, check: Callable[[Any], Any]) -> Problem:
    """Return an error as a problem of the fields that cause it.

    A field is a cause if the check passes with this one field at its default. If there is none,
    since something else is wrong too, it is one with which the check fails in another way. Else the
    fields are those that the error's text names.

    Args:
        error: The error of the check.
        section: The dataclass with the values that were checked.
        path: Its path, such as "model" or "optimizer".
        check: megatron-core's check of such a dataclass.
    """
    text = " ".join(str(error).split()).rstrip(".")
    names = fields_of(section)
    named = [word for word in _words(text) if word in names]
    causes = _causes(section, check, text)
    # Fields that the text names come first: the user reads about them.
    causes.sort(key=lambda name: name not in named)
    if not causes:
        causes = [name for name in named if not _is_default(section, name)]
    if not causes:
        problem = f"{path}: {_in_our_form(text, path, names, error)}"
        return Problem(_paths(path, named) or (path,), problem)
    first, *others = causes
    change = "change it"
    if others:
        change += " or " + ", ".join(_setting(section, path, name) for name in others[:_MANY])
    why = _in_our_form(text, path, names, error).removeprefix(f"{path}.{first} ")
    problem = f"{_setting(section, path, first)}: {why}; {change}"
    return Problem(_paths(path, [*causes, *named]), problem)


def _paths(path: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(join(path, name) for name in names))


def _words(text: str) -> list[str]:
    return [word.replace("-", "_") for word in re.findall(r"\w+(?:-\w+)*", text)]


def _in_our_form(text: str, path: str, names: Mapping[str, Any], error: Exception) -> str:
    """Return megatron-core's sentence with fields in place of its command line's flags."""
    if not text:
        return f"megatron-core does not take it ({type(error).__name__} without a reason)"

    def flag(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return f"{path}.{name}" if name in names else name

    text = re.sub(r"--([a-z][\w-]*\w)", flag, text)
    # Only words that are a name and nothing else.
    text = re.sub(
        r"(?<![\w.])(?:self\.)?(\w+_\w+)(?![\w.])",
        lambda found: f"{path}.{found[1]}" if found[1] in names else found[0],
        text,
    )
    word = text.split()[0]
    return text if word in names or not word[1:].islower() else text[0].lower() + text[1:]


def _causes(section: Any, check: Callable[[Any], Any], text: str) -> list[str]:
    """Return the fields that cause the error with this text, each alone."""
    cured, changed = [], []
    for name, field in fields_of(section).items():
        if is_runtime_hook(field) or not field.init or _is_default(section, name):
            continue
        if name in _WITHOUT_DEFAULT:
            continue
        other = copy.copy(section)
        object.__setattr__(other, name, default_of(field))
        try:
            check(other)
        except ERRORS as error:
            if " ".join(str(error).split()).rstrip(".") != text:
                changed.append(name)
        else:
            cured.append(name)
    return cured or changed


def _is_default(section: Any, name: str) -> bool:
    default = default_of(fields_of(section)[name])
    if default is dataclasses.MISSING:
        return True  # there is no other value to try
    value = getattr(section, name)
    return value is default or bool(value == default)


def _setting(section: Any, path: str, name: str) -> str:
    value = getattr(section, name)
    text = getattr(value, "__name__", None) if callable(value) else text_of(value)
    return f"{path}.{name}={text}"


def is_about_values(error: Exception) -> bool:
    """Whether an exception rejects a section's values: a user's mistake, or a check of a library.

    The libraries are megatron-core, torch, Transformer Engine and bridge. Any other exception of a
    section's code may be a bug, and keeps its traceback.
    """
    if is_usage_error(error):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    # Python's own modules, such as enum, raise on behalf of their callers.
    innermost = [package for package in packages if package not in sys.stdlib_module_names][-1]
    return innermost in ("bridge", "megatron", "torch", "transformer_engine")
