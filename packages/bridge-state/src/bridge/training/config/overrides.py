"""Changes of a configuration by YAML files and by overrides on the command line."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bridge.training.config.checks.suggestions import likely_meant, unknown_key
from bridge.training.config.checks.types import assign
from bridge.training.config.container import SECTIONS, ConfigContainer
from bridge.training.config.provenance import DERIVED
from bridge.training.config.resolution import resolve_collecting
from bridge.training.config.schema.convert import convert, takes_mappings
from bridge.training.config.schema.errors import ConfigError, ConversionError, Problem
from bridge.training.config.schema.fields import (
    TARGET,
    annotations_of,
    class_name,
    fields_of,
    is_dataclass_instance,
    is_runtime_hook,
    item_annotation,
    join,
    names_in,
    step_into,
)
from bridge.training.config.schema.import_limits import limit_imports
from bridge.training.config.schema.peft_methods import (
    METHOD,
    changed_method,
    method_class,
    method_names,
)
from bridge.training.config.schema.yaml12 import dump_yaml, load_yaml

_METHOD_PATH = f"peft.{METHOD}"
_OF_ONE_RUN = ("run_dir", "resume", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class YamlText:
    """The text of a YAML document, and its name in messages."""

    text: str
    source: str
    not_taken: tuple[str, ...] = ()
    """Fields of the file that `of_a_new_run` has removed."""

    def of_a_new_run(self) -> "YamlText":
        """Return the document without the fields of one run alone, if it is a run's config.yaml.

        A new run that starts from the configuration of another has a directory of its own. A file
        that was not written by a run is left as it is: its author set those fields.
        """
        try:
            plain = load_yaml(self.text)
        except ConversionError:
            return self  # It is reported when the document is merged.
        if not isinstance(plain, Mapping) or DERIVED not in plain:
            return self
        checkpoint = plain.get("checkpoint")
        given = checkpoint if isinstance(checkpoint, Mapping) else {}
        found = tuple(f"checkpoint.{name}" for name in _OF_ONE_RUN if given.get(name))
        kept = {name: value for name, value in given.items() if name not in _OF_ONE_RUN}
        text = dump_yaml({**plain, "checkpoint": kept})
        return dataclasses.replace(self, text=text, not_taken=found)


type YamlDocument = str | Path | YamlText | Mapping[str, Any]
"""YAML text, with a name or without; a file of YAML; or the parsed values."""


def apply_overrides(
    config: ConfigContainer,
    overrides: Sequence[str] = (),
    *,
    yaml_documents: Sequence[YamlDocument] = (),
) -> ConfigContainer:
    """Return a copy of `config` with the documents merged in order, then the overrides.

    Args:
        config: Where the run starts from, such as a recipe's configuration.
        overrides: ``section.field=value``; the value is a YAML scalar or list, ``null`` is none.
        yaml_documents: Sections with some or all of their fields. A document that names its
            ``recipe``, or a section's class in ``_target_``, must agree with `config`.

    Raises:
        ConfigError: With everything that is wrong in all of them.
    """
    merge = _Merge(config.copy())
    merge.merge_all(overrides, yaml_documents)
    if merge.problems:
        raise ConfigError(merge.problems)
    return merge.config


def configure(
    config: ConfigContainer,
    overrides: Sequence[str] = (),
    *,
    yaml_documents: Sequence[YamlDocument] = (),
    device: Literal["cuda", "cpu"] | Callable[[ConfigContainer], Literal["cuda", "cpu"]],
    world_size: int,
) -> ConfigContainer:
    """Apply overrides as `apply_overrides`, then `resolve`: one report for both.

    Args:
        config: As for `apply_overrides`.
        overrides: As for `apply_overrides`.
        yaml_documents: As for `apply_overrides`.
        device: The device of the run, or a function that chooses it once the overrides are applied.
        world_size: Ranks of the run.

    Raises:
        ConfigError: With every problem of either. A contradiction that involves a value which was
            rejected is not reported: its message would name a value that nobody gave.
    """
    merge = _Merge(config.copy())
    merge.merge_all(overrides, yaml_documents)
    where = device(merge.config) if callable(device) else device
    resolved, problems = resolve_collecting(
        merge.config, device=where, world_size=world_size, rejected=merge.rejected
    )
    if merge.problems or problems:
        raise ConfigError(merge.problems + problems)
    return resolved


class _Merge:
    """Changes one configuration in place, and collects what it had to reject."""

    def __init__(self, config: ConfigContainer) -> None:
        self.config = config
        self.problems: list[Problem] = []
        self.rejected: set[str] = set()
        """Fields whose values were rejected."""

    def merge_all(self, overrides: Sequence[str], documents: Sequence[YamlDocument]) -> None:
        for number, document in enumerate(documents, start=1):
            before = len(self.problems)
            source = f"YAML document {number}"
            if isinstance(document, Path):
                source = str(document)
            elif isinstance(document, YamlText):
                source = document.source
            with limit_imports(lambda: self._given_names(overrides)):
                self._merge_document(document)
            self.problems[before:] = [
                problem.with_text(f"{problem} ({source})") for problem in self.problems[before:]
            ]
        # Which fields exist depends on the method, so it is chosen first.
        for override in sorted(overrides, key=lambda text: not _chooses_method(text)):
            self._apply_override(override)

    # --- YAML documents

    def _given_names(self, overrides: Sequence[str]) -> set[str]:
        """Return the names on the command line and in the recipe: a document may have them too."""
        given = {text.partition("=")[2].strip() for text in overrides}
        with contextlib.suppress(ConfigError):  # A recipe may hold values without a name.
            given.update(_texts_in(self.config.to_dict()))
        return given

    def _merge_document(self, document: YamlDocument) -> None:
        try:
            plain = _read(document)
        except (ConversionError, OSError, UnicodeDecodeError) as error:
            self.problems.append(Problem((), f"the document {error}"))
            return
        if plain is None:
            return
        if not isinstance(plain, Mapping):
            self.problems.append(Problem((), f"expected sections with their fields, got {plain!r}"))
            return
        for section, content in plain.items():
            if section == "recipe":
                self._merge_recipe(content)
            elif section in (DERIVED, "command"):
                continue  # The entry point that is called says which it is.
            elif section not in SECTIONS:
                self._reject_unknown(str(section))
            elif content is None or isinstance(content, Mapping):
                self._merge_section(section, content)
            else:
                self._reject_value_of_section(section, content)
        provenance = self.config.provenance
        self.problems += provenance.record_derived(self.config, plain, is_complete=False)

    def _merge_recipe(self, name: Any) -> None:
        if self.config.recipe is None:
            self._set(self.config, "recipe", name, "recipe")
        elif name is not None and name != self.config.recipe:
            this = self.config.recipe
            self._reject("recipe", f"it belongs to {name!r}, and this run is of {this!r}")

    def _merge_section(self, section: str, content: Mapping[Any, Any] | None) -> None:
        if section == "peft" and content is not None and METHOD in content:
            self._choose_method(content[METHOD])
            if _METHOD_PATH in self.rejected:
                return
        present = getattr(self.config, section)
        if content is not None and dataclasses.is_dataclass(present):
            self._merge_fields(present, section, content)
        elif content is not None and present is not None:
            if content != {TARGET: class_name(type(present))}:
                self._reject(
                    section,
                    f"{class_name(type(present))} is not a dataclass, so text cannot change it: "
                    "set it from Python",
                )
        else:
            self._set(self.config, section, content, section)

    def _merge_fields(self, holder: Any, path: str, content: Mapping[Any, Any]) -> None:
        fields, this = fields_of(holder), class_name(type(holder))
        target = content.get(TARGET, this)
        if target != this:
            self._reject(path, f"{TARGET} is {target!r}, and this run's is {this!r}")
            return
        for key, value in content.items():
            here = join(path, key)
            if key == TARGET:
                continue
            if key not in fields:
                self._reject_unknown(here)
                continue
            annotation = annotations_of(type(holder))[key]
            if isinstance(value, Mapping) and dataclasses.is_dataclass(getattr(holder, key)):
                self._merge_fields(getattr(holder, key), here, value)
            elif isinstance(value, Mapping) and _has_parts(getattr(holder, key), annotation):
                self._merge_items(getattr(holder, key), item_annotation(annotation), here, value)
            else:
                self._set(holder, key, value, here)

    def _merge_items(
        self, present: dict[Any, Any], annotation: Any, path: str, content: Mapping[Any, Any]
    ) -> None:
        """Merge into a mapping of dataclasses; a new name is added."""
        for key, value in content.items():
            here = join(path, key)
            if key in present and isinstance(value, Mapping):
                self._merge_fields(present[key], here, value)
            else:
                self._set(present, key, value, here, annotation=annotation)

    # --- the command line

    def _apply_override(self, override: str) -> None:
        path, equals, text = override.partition("=")
        path = path.strip()
        section, *keys = path.split(".")
        if not equals:
            self.problems.append(Problem((path,), f"{override!r}: expected section.field=value"))
        elif section in ("recipe", "command"):
            self._reject(section, "it is chosen by its name, not by an override")
        elif section not in SECTIONS or not all(keys):
            self._reject_unknown(path)
        elif not keys and text != "null":
            self._reject_value_of_section(section, text)
        elif not text.strip():
            self._reject(path, "has no value; write null for none, '' for empty text")
        elif not keys:
            self._merge_section(section, None)
        elif path == _METHOD_PATH:
            self._choose_method(text.strip())
        elif section == "peft" and self.config.peft is None:
            if _METHOD_PATH not in self.rejected:
                methods = ", ".join(method_names())
                self._reject(
                    path,
                    f"the run trains the model itself; choose {_METHOD_PATH} (of {methods}) too",
                )
        else:
            self._set_by_path(section, keys, text.strip())

    def _set_by_path(self, section: str, keys: list[str], text: str) -> None:
        names = [section, *keys]
        holder: Any = self.config
        holder_path = ""
        for position, key in enumerate(names[:-1], start=1):
            path = join(holder_path, key)
            if key not in names_in(holder):
                self._reject_unknown(path)
                return
            inner = step_into(holder, key)
            if inner is None:
                inner = self._make_absent_section(holder, key, path)
            annotation = Any if isinstance(holder, Mapping) else annotations_of(type(holder))[key]
            if isinstance(inner, dict) and not _has_parts(inner, annotation):
                # A mapping of plain values: the rest of the path is the key, with its dots.
                key, item = ".".join(names[position:]), item_annotation(annotation)
                self._set(inner, key, text, join(path, key), annotation=item, from_text=True)
                return
            if not is_dataclass_instance(inner) and not isinstance(inner, dict):
                kind = "has no fields" if key != section else "is not a dataclass"
                self._reject(".".join(names), f"{path} {kind}, so text cannot change it")
                return
            holder, holder_path = inner, path
        path = join(holder_path, names[-1])
        if names[-1] not in names_in(holder):
            self._reject_unknown(path)
        elif isinstance(holder, Mapping):
            self._reject_value_with_fields(path, holder[names[-1]], text)
        else:
            self._set(holder, names[-1], text, path, from_text=True)

    def _make_absent_section(self, holder: Any, key: str, path: str) -> Any:
        """Create the optional section that is about to be set, of its annotated class."""
        try:
            made = convert({}, annotations_of(type(holder))[key], path)
        except ConversionError:
            return None
        assign(holder, key, made)
        return made

    # --- both

    def _choose_method(self, name: Any) -> None:
        if name in (None, "null"):
            self.config.peft = None
            return
        try:
            self.config.peft = changed_method(self.config.peft, method_class(name))
        except ConversionError as error:
            self._reject(_METHOD_PATH, str(error))
            self.rejected.add(_METHOD_PATH)

    def _set(
        self,
        holder: Any,
        name: str,
        value: Any,
        path: str,
        *,
        annotation: Any = None,
        from_text: bool = False,
    ) -> None:
        """Set a field, or an item of a mapping whose values are of `annotation`.

        Args:
            holder: A dataclass or a mapping.
            name: The field or the key.
            value: A plain value.
            path: Its path.
            annotation: Of the items of a mapping.
            from_text: Whether the value is the text of an override.
        """
        if not isinstance(holder, dict):
            annotation = annotations_of(type(holder))[name]
            if is_runtime_hook(fields_of(holder)[name]) and value not in (None, "null"):
                self._reject(path, "is set by the loop while it runs, not by text")
                return
        try:
            converted = (_convert_text if from_text else convert)(value, annotation, path)
        except ConversionError as error:
            self.problems += error.as_problems(path)
            self.rejected.add(path)
            return
        if isinstance(holder, dict):
            holder[name] = converted
        else:
            assign(holder, name, converted)
        if from_text:
            self.config.provenance.mark_given(path)

    def _reject_unknown(self, path: str) -> None:
        self.problems.append(unknown_key(self.config, path))
        self.rejected.update(likely_meant(self.config, path))

    def _reject_value_of_section(self, section: str, value: Any) -> None:
        self._reject_value_with_fields(section, getattr(self.config, section), value)

    def _reject_value_with_fields(self, path: str, present: Any, value: Any) -> None:
        example = next(iter(names_in(present)), None)
        hint = f"; set its fields, such as {path}.{example}" if example else ""
        self._reject(path, f"is a section, it cannot be {value!r}{hint}")

    def _reject(self, path: str, why: str) -> None:
        self.problems.append(Problem((path,), f"{path}: {why}"))


def _chooses_method(override: str) -> bool:
    return override.partition("=")[0].strip() == _METHOD_PATH


def _texts_in(plain: Any) -> Iterator[str]:
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, Mapping):
        for value in plain.values():
            yield from _texts_in(value)


def _has_parts(value: Any, annotation: Any) -> bool:
    """Whether `value` is a mapping of dataclasses."""
    if not isinstance(value, dict):
        return False
    return dataclasses.is_dataclass(item_annotation(annotation)) or any(
        is_dataclass_instance(item) for item in value.values()
    )


def _read(document: YamlDocument) -> Any:
    if isinstance(document, Path):
        document = document.read_text(encoding="utf-8")
    if isinstance(document, YamlText):
        document = document.text
    return load_yaml(document) if isinstance(document, str) else document


def _convert_text(text: str, annotation: Any, path: str) -> Any:
    """Convert an override's text by YAML's rules; take it literally where a string is wanted."""
    try:
        value = load_yaml(text)
    except ConversionError:
        value = text
    if isinstance(value, str) and text[0] not in "'\"":
        value = text  # YAML would cut a " #..." off as a comment.
    try:
        return convert(value, annotation, path)
    except ConversionError as error:
        if isinstance(value, str) or (isinstance(value, Mapping) and takes_mappings(annotation)):
            raise
        try:
            # A text that is a number or nothing in YAML may be a name here, such as `null`.
            return convert(text, annotation, path)
        except ConversionError:
            raise error from None
