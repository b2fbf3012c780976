"""Fills in and checks a configuration: the one place that decides by the device."""

from collections.abc import Collection
from typing import Literal

from bridge.training.config.checks.contradictions import rebuilt_sections, validate
from bridge.training.config.checks.types import check_types
from bridge.training.config.container import ConfigContainer
from bridge.training.config.derivation import fill_derived_values, forget_derived_values
from bridge.training.config.errors import ConfigError


def resolve(
    config: ConfigContainer, *, device: Literal["cuda", "cpu"], world_size: int
) -> ConfigContainer:
    """Return a copy of `config` in which everything is filled in and checked.

    Args:
        config: What the user asked for; it is left as it is.
        device: Where the run takes place.
        world_size: Ranks of the run, for the checks of the parallel layout.

    Raises:
        ConfigError: With every wrong type, unknown attribute and contradiction at once.
    """
    resolved, problems = resolve_collecting(config, device=device, world_size=world_size)
    if problems:
        raise ConfigError(problems, remainder=resolved)
    return resolved


def resolve_collecting(
    config: ConfigContainer,
    *,
    device: Literal["cuda", "cpu"],
    world_size: int,
    refused: Collection[str] = (),
) -> tuple[ConfigContainer, list[str]]:
    """Do what `resolve` does, and return its problems instead of raising them.

    `refused` names fields whose values were refused before: nothing is said about those.
    """
    resolved = config.copy()
    problems, wrong_type = check_types(resolved)
    refused = {*refused, *wrong_type}
    forget_derived_values(resolved)
    resolved.dist.device = device
    if resolved.mixed_precision.precision == "auto":
        resolved.mixed_precision.precision = "bf16" if device == "cuda" else "fp32"
    problems += fill_derived_values(resolved)
    problems += rebuilt_sections(resolved, refused)
    problems += validate(resolved, world_size=world_size, refused=refused)
    return resolved, problems
