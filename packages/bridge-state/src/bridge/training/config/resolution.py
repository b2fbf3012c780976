"""Resolution of a configuration: derived values filled in for a device, and all checks."""

from collections.abc import Collection, Iterator
from typing import Literal

from bridge.training.config.checks.bounds import range_problems
from bridge.training.config.checks.contradictions import contradictions
from bridge.training.config.checks.megatron import rebuild_sections, transformer_errors
from bridge.training.config.checks.own_sections import misspelled_methods, section_problems
from bridge.training.config.checks.parallel_layout import layout_problems
from bridge.training.config.checks.types import check_types, url_problems
from bridge.training.config.checks.unsupported import unsupported_settings
from bridge.training.config.container import ConfigContainer
from bridge.training.config.schema.errors import ConfigError, Problem
from bridge.training.config.schema.fields import is_within


def resolve(
    config: ConfigContainer, *, device: Literal["cuda", "cpu"], world_size: int
) -> ConfigContainer:
    """Return a copy of `config` with all derived values, after all checks.

    Args:
        config: The user's configuration; it is not changed.
        device: The device of the run.
        world_size: Ranks of the run, for the checks of the parallel layout.

    Raises:
        ConfigError: With every wrong type, unknown attribute and contradiction.
    """
    resolved, problems = resolve_collecting(config, device=device, world_size=world_size)
    if problems:
        raise ConfigError(problems)
    return resolved


def resolve_collecting(
    config: ConfigContainer,
    *,
    device: Literal["cuda", "cpu"],
    world_size: int,
    rejected: Collection[str] = (),
) -> tuple[ConfigContainer, list[Problem]]:
    """Resolve a configuration, and return its problems instead of raising them.

    Args:
        config: As for `resolve`.
        device: As for `resolve`.
        world_size: As for `resolve`.
        rejected: Fields whose values were rejected before. A problem about one of them is not
            reported, since it would name a value that nobody gave.
    """
    resolved = config.copy()
    problems, wrong_types = check_types(resolved)
    rejected = {*rejected, *wrong_types}
    resolved.provenance.reset_derived(resolved)
    resolved.dist.device = device
    if resolved.mixed_precision.precision == "auto":
        resolved.mixed_precision.precision = "bf16" if device == "cuda" else "fp32"
    problems += resolved.provenance.fill_in_derived(resolved)
    problems += rebuild_sections(resolved, rejected)
    urls = url_problems(resolved)
    problems += urls
    rejected.update(problem.blamed for problem in urls)
    checked = _problems_of_values(resolved, world_size, rejected)
    problems += [problem for problem in checked if not problem.is_about(rejected)]
    return resolved, problems


def _problems_of_values(
    config: ConfigContainer, world_size: int, rejected: Collection[str]
) -> Iterator[Problem]:
    ours = [
        *unsupported_settings(config),
        *range_problems(config),
        *section_problems(config, rejected),
    ]
    of_layout = layout_problems(config, world_size)
    yield from contradictions(config)
    yield from of_layout
    if not any(is_within(path, "model") for path in rejected):
        yield from transformer_errors(config, [*of_layout, *ours])
    yield from ours
    yield from misspelled_methods(config)
