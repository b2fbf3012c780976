"""What installed packages offer by name: recipes, methods, targets of an export, commands.

A package declares an entry point in a group, such as ``bridge.recipes``; nothing of it is imported
before its name is asked for.
"""

from collections.abc import Callable
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
            Exception: Importing it fails; a note says which entry point of which package it is.
        """
        found = self.entries()
        if name in found:
            try:
                return found[name].load()
            except Exception as error:
                error.add_note(f"in {_described(found[name])}")
                raise
        if not found:
            raise UsageError(
                f"{name!r} is not there, as no package with {self.what} is installed; install one, "
                f"such as {self.package} (pip install --find-links DIST {self.package}, from the "
                "folder of wheels)"
            )
        hint = did_you_mean(name, found)
        raise UsageError(f"there is no {name!r}{hint} (there are {', '.join(found)})")

    def usable[T](self, use: Callable[[Any], T]) -> tuple[dict[str, T], dict[str, str]]:
        """Import everything that is offered, each for itself.

        Args:
            use: Takes what an entry point leads to.

        Returns:
            By name, what `use` returned; and for each entry point that cannot be imported or used a
            line that names its package and the error.
        """
        results, broken = {}, {}
        for name, entry in self.entries().items():
            try:
                results[name] = use(entry.load())
            # Whatever another package does as it is imported must not end the command.
            except (Exception, SystemExit) as error:
                broken[name] = (
                    f"{_described(entry)} cannot be used ({type(error).__name__}: {error}); repair "
                    "or uninstall that package"
                )
        return results, broken


def _described(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"the entry point {entry.name} = {entry.value} ({entry.group}) of {package}"


RECIPES = Offers("bridge.recipes", "recipes", "bridge-steps-gpt")
COMMANDS = Offers("bridge.commands", "commands", "bridge-steps-gpt")
EXPORTERS = Offers("bridge.exporters", "exporters", "bridge-steps-gpt")
PEFT_METHODS = Offers("bridge.peft", "methods of fine-tuning", "bridge-peft")
OFFERS = (RECIPES, COMMANDS, EXPORTERS, PEFT_METHODS)
