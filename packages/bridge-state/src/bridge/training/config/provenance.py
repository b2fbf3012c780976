"""Where the values of a configuration came from: the user, or the values that they follow from.

A field that resolution filled in must not be taken for the user's wish later: it follows when the
values that it came from are changed.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bridge.training.config.derivation import derived_values
from bridge.training.config.schema.errors import Problem
from bridge.training.config.schema.fields import default_of, fields_of
from bridge.training.config.schema.paths import exists, value_at

if TYPE_CHECKING:
    from bridge.training.config.container import ConfigContainer

DERIVED = "derived"
"""The key of a saved configuration that lists the fields which resolution filled in."""


class Provenance:
    """The fields of a configuration that the command line set, and those that were derived."""

    def __init__(self) -> None:
        """Start with neither: what differs from its default is the user's."""
        self._given: set[str] = set()
        self._derived: dict[str, Any] = {}

    def mark_given(self, path: str) -> None:
        """Record that the command line set a field, which resolution must not set otherwise."""
        self._given.add(path)

    def is_given(self, path: str) -> bool:
        """Whether the command line set the field."""
        return path in self._given

    def is_derived(self, path: str) -> bool:
        """Whether resolution filled the field in."""
        return path in self._derived

    def derived_paths(self, config: "ConfigContainer") -> list[str]:
        """Return the fields that resolution filled in and nobody changed since."""
        return [
            path
            for path, value in self._derived.items()
            if _are_same(_get_value(config, path), value)
        ]

    def record_derived(
        self, config: "ConfigContainer", plain: Mapping[Any, Any], *, is_complete: bool
    ) -> list[Problem]:
        """Take what a saved configuration had filled in for derived, not for the user's own.

        Those are the fields that it lists, and those that are as they must be by the values that
        they follow from.

        Args:
            config: With the values of `plain`.
            plain: The saved configuration, or a document with some of its fields.
            is_complete: Whether all values come from `plain`: a field that it lacks is at its
                default.

        Returns:
            A problem if the list is none.
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
        """Give what resolution filled in its default again, to be filled in anew."""
        for path in self.derived_paths(config):
            holder, name = _holder(config, path)
            default = default_of(fields_of(holder)[name])
            if path not in self._given and default is not dataclasses.MISSING:
                object.__setattr__(holder, name, default)
        self._derived = {}

    def fill_in_derived(self, config: "ConfigContainer") -> list[Problem]:
        """Set every derived value; return a problem for each that the user had set otherwise."""
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
                            f"{path}={_text(present)} contradicts {derived.reason}, from which "
                            f"{_text(derived.value)} follows: remove the one or change the other",
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
