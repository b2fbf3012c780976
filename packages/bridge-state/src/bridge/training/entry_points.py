"""Entry points of installed packages: recipes, commands, exporters and PEFT methods by name.

A package offers one by an entry point in a group such as ``bridge.recipes``. It is imported only
when its name is looked up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bridge.training.spelling import did_you_mean
from bridge.training.usage_error import UsageError


@dataclass(frozen=True)
class EntryPointGroup:
    """The entry points of one kind of plugin."""

    name: str
    """The name of the group, such as "bridge.recipes"."""
    plural: str
    """The kind of plugin in messages, such as "recipes"."""
    package: str
    """A package of this project that offers some."""

    def entries(self) -> dict[str, EntryPoint]:
        """Return the entry points of all installed packages by name, sorted."""
        found = sorted(entry_points(group=self.name), key=lambda entry: entry.name)
        return {entry.name: entry for entry in found}

    def find(self, name: str) -> Any:
        """Import and return the object offered under `name`.

        Raises:
            UsageError: There is no such name; the message lists the names, or what to install.
            Exception: The import failed; a note names the entry point and its package.
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
                f"{name!r} is not there, as no package with {self.plural} is installed; install "
                f"one, such as {self.package} (pip install --find-links DIST {self.package}, from "
                "the folder of wheels)"
            )
        hint = did_you_mean(name, found)
        raise UsageError(f"there is no {name!r}{hint} (there are {', '.join(found)})")

    def usable[T](self, use: Callable[[Any], T]) -> tuple[dict[str, T], dict[str, str]]:
        """Import and use each object that is offered, even if others fail.

        Args:
            use: Called with the object.

        Returns:
            The results of `use` by name; and by name, for each entry point that failed, a line with
            its package and the error.
        """
        results, broken = {}, {}
        for name, entry in self.entries().items():
            try:
                results[name] = use(entry.load())
            # Whatever a package does while it is imported, the command goes on.
            except (Exception, SystemExit) as error:
                broken[name] = (
                    f"{_described(entry)} cannot be used ({type(error).__name__}: {error}); repair "
                    "or uninstall that package"
                )
        return results, broken


def _described(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"the entry point {entry.name} = {entry.value} ({entry.group}) of {package}"


RECIPES = EntryPointGroup("bridge.recipes", "recipes", "bridge-steps-gpt")
COMMANDS = EntryPointGroup("bridge.commands", "commands", "bridge-steps-gpt")
EXPORTERS = EntryPointGroup("bridge.exporters", "exporters", "bridge-steps-gpt")
PEFT_METHODS = EntryPointGroup("bridge.peft", "methods of fine-tuning", "bridge-peft")
GROUPS = (RECIPES, COMMANDS, EXPORTERS, PEFT_METHODS)
