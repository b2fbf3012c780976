"""Errors of single values: what cannot be converted to the type of its field."""

from typing import TYPE_CHECKING

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    pass


class ConversionError(UsageError):
    """One value does not fit its field, or cannot be written as text."""


class FieldProblems(ConversionError):
    """Several fields of one nested dataclass are wrong; `lines` begin with their paths."""

    def __init__(self, lines: list[str]) -> None:
        """Keep one line for each field."""
        self.lines = lines
        super().__init__("\n".join(lines))
