"""A recipe: a named configuration, with the forward step that goes with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


@dataclass(kw_only=True, frozen=True)
class Recipe:
    """A named run: its forward step, and a fresh configuration with each call."""

    name: str
    summary: str
    """One line for ``bridge recipes``."""
    make_config: Callable[[], "ConfigContainer"]
    forward_step: Callable[..., Any]
    callbacks: Callable[[], Sequence[Any]] = tuple
    """Makes the callbacks that the command adds, such as one that prints a summary at the end."""

    def __call__(self) -> "ConfigContainer":
        """Return a fresh, unshared configuration."""
        config = self.make_config()
        config.recipe = self.name
        return config
