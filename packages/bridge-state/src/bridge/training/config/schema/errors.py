"""Problems of a configuration, and the errors that carry them."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any, override

from bridge.training.usage_error import UsageError


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem of a configuration: code reads the fields, users read the text."""

    fields: tuple[str, ...]
    """Dotted paths of the fields that it is about; the first one is to blame."""
    text: str
    """``section.field=value: why; what to do``, without a full stop."""

    @property
    def blamed(self) -> str:
        """The field that is to blame; empty if none is."""
        return self.fields[0] if self.fields else ""

    def is_about(self, paths: Collection[str]) -> bool:
        """Whether one of these fields is among those of the problem."""
        return any(field in paths for field in self.fields)

    def with_text(self, text: str) -> "Problem":
        """Return the same problem in other words."""
        return dataclasses.replace(self, text=text)

    @override
    def __str__(self) -> str:
        return self.text


class ConversionError(UsageError):
    """One value does not fit its field, or cannot be written as text."""

    def as_problems(self, path: str) -> list[Problem]:
        """Return the problems of the field at `path`, whose value it is."""
        return [Problem((path,), f"{path}: {self}")]


class WrongType(ConversionError):
    """A value is of another type than its field; there is no better explanation."""


class FieldProblems(ConversionError):
    """Several fields of one nested dataclass are wrong."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Keep one problem for each field."""
        self.problems = list(problems)
        super().__init__("\n".join(map(str, problems)))

    @override
    def as_problems(self, path: str) -> list[Problem]:
        return self.problems


class ConfigError(UsageError):
    """A configuration cannot be used; `problems` has one line for each reason."""

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        """Collect `problems`, each once."""
        self.problems = list(dict.fromkeys(map(str, problems)))
        count = len(self.problems)
        heading = f"{count} problem{'' if count == 1 else 's'} in the configuration:"
        super().__init__("\n  - ".join([heading, *self.problems]))

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # Other ranks make it again from the problems; pickle would pass the message.
        return type(self), (self.problems,), self.__dict__
