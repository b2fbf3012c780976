"""Reference of a configuration's keys, with type, value and meaning, for ``--help``."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.training.config.checks.suggestions import declared_class
from bridge.training.config.container import SECTIONS, ConfigContainer
from bridge.training.config.schema.errors import FieldProblems
from bridge.training.config.schema.fields import (
    annotations_of,
    describe_annotation,
    fields_of,
    is_dataclass_instance,
    is_runtime_hook,
    join,
)
from bridge.training.config.schema.peft_methods import METHOD, method_names
from bridge.training.config.schema.to_plain import to_plain
from bridge.training.config.schema.yaml12 import dump_scalar


@dataclass(kw_only=True, frozen=True)
class Key:
    """One key that a YAML file or ``section.field=value`` may set."""

    path: str
    """Such as "train.train_iters"."""
    accepts: str
    """The types of its values, in words."""
    value: str
    """Its value in the configuration, as YAML."""
    meaning: str
    """The first sentence of the field's docstring; empty if it has none."""


def describe(config: ConfigContainer) -> list[Key]:
    """Return every key of `config`, the model's and the dataset's too, section by section.

    Fields that only a running loop sets (megatron-core's hooks) are skipped. A section that is
    None is listed with its class's defaults.
    """
    keys: list[Key] = []
    for section in SECTIONS:
        holder: Any = getattr(config, section)
        if holder is None and (cls := declared_class(section)):
            holder = cls()
        if dataclasses.is_dataclass(holder):
            keys.extend(_keys(holder, section))
        elif section == "peft" and holder is None:
            keys.append(_choice_of_method())
    return keys


def reference_text(config: ConfigContainer, *, width: int = 100) -> str:
    """Return `describe` as text: a key with its value on one line, its meaning below it."""
    sections: dict[str, list[str]] = {}
    for key in describe(config):
        lines = sections.setdefault(key.path.partition(".")[0], [])
        lines.append(f"  {key.path}={key.value}  ({key.accepts})")
        lines.extend(
            textwrap.wrap(key.meaning, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
        )
    return "\n".join("\n".join([f"{name}:", *lines]) for name, lines in sections.items())


def _choice_of_method() -> Key:
    return Key(
        path=f"peft.{METHOD}",
        accepts=" or ".join([*method_names(), "null"]),
        value="null",
        meaning="The adapters that are trained on a frozen model; the method has keys of its own.",
    )


def _keys(holder: Any, path: str) -> Iterator[Key]:
    annotations, meanings = annotations_of(type(holder)), _meanings_of(type(holder))
    for name, field in fields_of(holder).items():
        if is_runtime_hook(field):
            continue
        here, value = join(path, name), getattr(holder, name)
        if is_dataclass_instance(value):
            yield from _keys(value, here)
            continue
        if isinstance(value, Mapping) and any(map(is_dataclass_instance, value.values())):
            for key, item in value.items():
                yield from _keys(item, join(here, key))
            continue
        try:
            shown = dump_scalar(to_plain(value, annotations[name], here))
        except FieldProblems:
            shown = f"<{type(value).__name__}>"  # It has no text, and can be set from Python only.
        yield Key(
            path=here,
            accepts=describe_annotation(annotations[name]),
            value=shown,
            meaning=meanings.get(name, ""),
        )


def _meanings_of(cls: type) -> dict[str, str]:
    """Return the first sentence of each field's docstring, that of the nearest class."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            meanings.update(_own_meanings(base))
    return meanings


def _own_meanings(cls: type) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return  # Defined where there is no source to read, such as an interactive session.
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef)
    for pair in itertools.pairwise(definition.body):
        match pair:
            case (
                ast.AnnAssign(target=ast.Name(id=field)),
                ast.Expr(value=ast.Constant(value=str(docstring))),
            ):
                yield field, _first_sentence(docstring)


def _first_sentence(text: str) -> str:
    words = " ".join(text.split())
    end = re.search(r"\.(?= [A-Z`])(?<!e\.g\.)(?<!i\.e\.)", words)
    return words[: end.end()] if end else words
