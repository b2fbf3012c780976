"""The one error of a configuration: everything that is wrong with it, at once."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from bridge.training.config.schema.errors import Problem
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config.container import ConfigContainer


class ConfigError(UsageError):
    """A configuration cannot be used; `problems` has one line for each reason."""

    def __init__(
        self, problems: Iterable[Problem | str], *, remainder: "ConfigContainer | None" = None
    ) -> None:
        """Collect `problems`; `remainder` is the configuration without the rejected values."""
        self.problems = list(dict.fromkeys(map(str, problems)))
        self.remainder = remainder
        count = len(self.problems)
        heading = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(
            "\n".join([f"{heading} in the configuration:", *(f"  - {p}" for p in self.problems)])
        )
