"""megatron-core's own checks of its dataclasses: optimizer, DDP and transformers."""

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from bridge.training.config.checks.unsupported import unsupported_settings
from bridge.training.config.container import ConfigContainer
from bridge.training.config.schema.errors import Problem
from bridge.training.config.schema.fields import is_within, parts_of
from bridge.training.config.schema.megatron_errors import ERRORS, is_about_values, problem_of


@runtime_checkable
class CanBeFinalized(Protocol):
    """A model section that defers megatron-core's own checks."""

    def finalized(self) -> Any:
        """Return a copy that megatron-core has checked and completed."""


def rebuild_sections(config: ConfigContainer, rejected: Collection[str]) -> list[Problem]:
    """Construct optimizer and ddp again, in place, for megatron-core's checks of their values.

    These dataclasses check and complete themselves when they are constructed. Values that were set
    afterwards have not been checked yet.

    Args:
        config: A configuration with its derived values.
        rejected: Fields whose values were rejected; a section with one of them is left as it is.
    """
    problems = []
    for name in ("optimizer", "ddp"):
        if any(is_within(path, name) for path in rejected):
            continue
        section = getattr(config, name)
        try:
            setattr(config, name, dataclasses.replace(section))
        except ERRORS as error:
            if not is_about_values(error):
                raise
            problem = problem_of(error, section, name, dataclasses.replace)
            if not _is_rejected(problem, unsupported_settings(config)):
                problems.append(problem)
    return problems


def transformer_errors(config: ConfigContainer, ours: Sequence[Problem]) -> Iterator[Problem]:
    """Yield the problems that megatron-core finds in the transformers of the model.

    Args:
        config: A configuration with its derived values.
        ours: Problems that are reported anyway; the same is not reported twice.
    """
    for path, part in parts_of(config.model, "model"):
        if not isinstance(part, CanBeFinalized):
            continue
        try:
            _finalize_quietly(part)
        except ERRORS as error:
            if not is_about_values(error):
                raise
            problem = problem_of(error, part, path, _finalize_quietly)
            if not _is_rejected(problem, ours) and not _is_covered(problem, ours):
                yield problem


def _is_rejected(problem: Problem, ours: Iterable[Problem]) -> bool:
    """Whether a problem of ours blames one of the same fields, which then has a better message."""
    return any(other.blamed in problem.fields for other in ours)


def _is_covered(problem: Problem, ours: Sequence[Problem]) -> bool:
    """Whether a problem of ours is about all of the fields."""
    fields = set(problem.fields)
    return bool(fields) and any(fields <= set(other.fields) for other in ours)


def _finalize_quietly(model: CanBeFinalized) -> None:
    # Its warnings are shown when the model is built.
    with warnings.catch_warnings(action="ignore"):
        model.finalized()
