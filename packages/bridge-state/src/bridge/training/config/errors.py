"""The one error of a configuration: everything that is wrong with it, at once."""

from collections.abc import Iterable
from typing import Any, override

from bridge.training.config.schema.errors import Problem
from bridge.training.usage_error import UsageError


class ConfigError(UsageError):
    """A configuration cannot be used; `problems` has one line for each reason."""

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        """Collect `problems`, each once."""
        self.problems = list(dict.fromkeys(map(str, problems)))
        count = len(self.problems)
        heading = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(
            "\n".join([f"{heading} in the configuration:", *(f"  - {p}" for p in self.problems)])
        )

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # Other ranks make it again from the problems; pickle would pass the message.
        return type(self), (self.problems,), self.__dict__
