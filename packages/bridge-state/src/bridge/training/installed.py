"""What installed packages offer by name: recipes, methods, targets of an export, commands.

A package declares an entry point in a group, such as ``bridge.recipes``; nothing of it is imported
before its name is asked for.
"""

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bridge.training.spelling import did_you_mean
from bridge.training.usage_error import UsageError


@dataclass(frozen=True)
class Offers:
    """One group of entry points."""

    group: str
    """Its name, such as "bridge.recipes"."""
    what: str
    """What is offered, in the plural, as a message says it."""
    package: str
    """A package of this project that offers some."""

    def entries(self) -> dict[str, EntryPoint]:
        """Return what the installed packages offer, in the order of the names."""
        found = sorted(entry_points(group=self.group), key=lambda entry: entry.name)
        return {entry.name: entry for entry in found}

    def find(self, name: str) -> Any:
        """Import and return what is offered under `name`.

        Raises:
            UsageError: There is no such name; the message says what there is, or what to install.
        """
        found = self.entries()
        if name in found:
            return found[name].load()
        if not found:
            raise UsageError(
                f"{name!r} is not there, as no package with {self.what} is installed; install one, "
                f"such as {self.package} (pip install --find-links DIST {self.package}, from the "
                "folder of wheels)"
            )
        hint = did_you_mean(name, found)
        raise UsageError(f"there is no {name!r}{hint} (there are {', '.join(found)})")


RECIPES = Offers("bridge.recipes", "recipes", "bridge-steps-gpt")
COMMANDS = Offers("bridge.commands", "commands", "bridge-steps-gpt")
EXPORTERS = Offers("bridge.exporters", "exporters", "bridge-steps-gpt")
PEFT_METHODS = Offers("bridge.peft", "methods of fine-tuning", "bridge-peft")
OFFERS = (RECIPES, COMMANDS, EXPORTERS, PEFT_METHODS)
