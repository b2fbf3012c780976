"""Provenance of a configuration's values: set by the user, or derived from other values.

A derived value is not the user's wish: it changes with the values that it was derived from.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bridge.training.config.derivation import derived_values
from bridge.training.config.schema.errors import Problem
from bridge.training.config.schema.fields import default_of, exists, fields_of, value_at

if TYPE_CHECKING:
    from bridge.training.config.container import ConfigContainer

DERIVED = "derived"
"""The key of a saved configuration that lists its derived fields."""


class Provenance:
    """The fields of a configuration that overrides set, and those that resolution derived."""

    def __init__(self) -> None:
        """Start with neither: a value that differs from its default is the user's."""
        self._given: set[str] = set()
        self._derived: dict[str, Any] = {}

    def mark_given(self, path: str) -> None:
        """Record that an override set a field: resolution keeps the value, even a default."""
        self._given.add(path)

    def is_given(self, path: str) -> bool:
        """Whether an override set the field."""
        return path in self._given

    def is_derived(self, path: str) -> bool:
        """Whether resolution derived the field's value."""
        return path in self._derived

    def derived_paths(self, config: "ConfigContainer") -> list[str]:
        """Return the fields whose derived value nobody has changed since."""
        return [
            path
            for path, value in self._derived.items()
            if _are_same(_get_value(config, path), value)
        ]

    def record_derived(
        self, config: "ConfigContainer", plain: Mapping[Any, Any], *, is_complete: bool
    ) -> list[Problem]:
        """Record the derived values of a saved configuration as derived, not as the user's own.

        Those are the fields that it lists as derived, and those whose value follows from others.

        Args:
            config: With the values of `plain`.
            plain: The saved configuration, or a document with some of its fields.
            is_complete: Whether all values come from `plain`: a field that it lacks is at its
                default.

        Returns:
            A problem if its entry of derived fields is not a list of them.
        """
        listed = plain.get(DERIVED) or []
        problems = []
        if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
            text = f"{DERIVED}: expected a list of section.field, got {listed!r}"
            problems.append(Problem((DERIVED,), text))
            listed = []
        follows = [
            path
            for path, derived in derived_values(config).items()
            if derived.reason is not None and _are_same(_get_value(config, path), derived.value)
        ]
        recorded = [path for path in follows if is_complete or exists(plain, path)]
        recorded += [path for path in listed if exists(plain, path) and exists(config, path)]
        for path in recorded:
            if path not in self._given:
                self._derived[path] = _get_value(config, path)
        return problems

    def reset_derived(self, config: "ConfigContainer") -> None:
        """Set derived values back to their defaults, to be derived anew."""
        for path in self.derived_paths(config):
            holder, name = _holder(config, path)
            default = default_of(fields_of(holder)[name])
            if path not in self._given and default is not dataclasses.MISSING:
                object.__setattr__(holder, name, default)
        self._derived = {}

    def fill_in_derived(self, config: "ConfigContainer") -> list[Problem]:
        """Set every derived value; return a problem for each that contradicts the user's value."""
        problems = []
        for path, derived in derived_values(config).items():
            holder, name = _holder(config, path)
            present = getattr(holder, name)
            is_default = _are_same(present, default_of(fields_of(holder)[name]))
            if path in self._given or not is_default:
                if derived.reason is None:
                    continue
                if not _are_same(present, derived.value):
                    problems.append(
                        Problem(
                            (path, derived.source),
                            f"{path}={_text(present)}: contradicts {derived.reason}, from which "
                            f"{_text(derived.value)} follows; remove the one or change the other",
                        )
                    )
            object.__setattr__(holder, name, derived.value)
            self._derived[path] = derived.value
        return problems


def _get_value(config: "ConfigContainer", path: str) -> Any:
    return getattr(*_holder(config, path))


def _holder(config: "ConfigContainer", path: str) -> tuple[Any, str]:
    place, _, name = path.rpartition(".")
    return value_at(config, place), name


def _are_same(left: Any, right: Any) -> bool:
    """Whether two field values are equal and of one type (1 is not True)."""
    return type(left) is type(right) and bool(left == right)


def _text(value: Any) -> str:
    return str(value).removeprefix("torch.").lower()
