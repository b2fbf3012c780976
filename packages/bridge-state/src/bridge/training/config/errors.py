"""The one error of a configuration: everything that is wrong with it, at once."""

import sys
import traceback
from typing import TYPE_CHECKING

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config.container import ConfigContainer


class ConfigError(UsageError):
    """A configuration cannot be used; `problems` has one line for each reason."""

    def __init__(self, problems: list[str], *, remainder: "ConfigContainer | None" = None) -> None:
        """Collect `problems`; `remainder` is the configuration without the refused values."""
        self.problems = list(dict.fromkeys(problems))
        self.remainder = remainder
        count = len(self.problems)
        heading = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(
            "\n".join([f"{heading} in the configuration:", *(f"  - {p}" for p in self.problems)])
        )


class ConversionError(UsageError):
    """One value does not fit its field, or cannot be written as text."""


class FieldProblems(ConversionError):
    """Several fields of one nested dataclass are wrong; `lines` begin with their paths."""

    def __init__(self, lines: list[str]) -> None:
        """Keep one line for each field."""
        self.lines = lines
        super().__init__("\n".join(lines))


def is_raised_by_library(error: Exception) -> bool:
    """Whether an exception comes from a check of megatron-core's or torch's, or from our own.

    One of a section's own code may be a bug, and keeps its traceback.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    # What these call of Python's own, such as an enum, raises for them.
    innermost = [package for package in packages if package not in sys.stdlib_module_names][-1]
    return innermost in ("bridge", "megatron", "torch", "transformer_engine")
