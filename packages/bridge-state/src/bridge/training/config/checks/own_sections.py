"""Checks of sections: the problems that they report themselves, and misspelled methods."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from bridge.training.config.container import SECTIONS, ConfigContainer
from bridge.training.config.schema.errors import Problem
from bridge.training.config.schema.fields import fields_of
from bridge.training.contracts import (
    ArrangesRanks,
    ChecksItself,
    DatasetConfig,
    DerivesFields,
    DrawsLayout,
    LeavesFieldsOpen,
    ModelConfig,
    NamesWeights,
    PlacesModules,
    ScalesLearningRates,
)
from bridge.training.spelling import nearest

_OF_MODELS = (
    ModelConfig,
    LeavesFieldsOpen,
    DerivesFields,
    ArrangesRanks,
    DrawsLayout,
    PlacesModules,
    ScalesLearningRates,
    ChecksItself,
    NamesWeights,
)
# Optional methods that no contract lists: checks.megatron.CanBeFinalized, throughput.CountsFlops.
_MORE = ("finalized", "training_flops_per_token", "weight_gradient_flops_per_token")
_OF_DATASETS = (DatasetConfig, ChecksItself)
_NEAR, _NEAR_SPELLED_OUT = 0.65, 0.8

# A section, at the beginning of a line, or a field of one anywhere.
_FIELD = re.compile(
    rf"(?:^(?:{'|'.join(SECTIONS)})(?=[:=])|(?<![\w.])(?:{'|'.join(SECTIONS)})(?:\.\w+)+)(?![\w.])"
)


def as_problem(line: str | Problem, section: str) -> Problem:
    """Return a line that a section yields as a problem of the fields that it names.

    The line has the documented form, ``section.field=value: why; what to do``. One that names no
    field is about the section.
    """
    if isinstance(line, Problem):
        return line
    return Problem(tuple(dict.fromkeys(_FIELD.findall(line))) or (section,), line)


def section_problems(config: ConfigContainer, rejected: Collection[str]) -> Iterator[Problem]:
    """Yield the problems that sections report by their own checks (`ChecksItself`).

    Args:
        config: A configuration with its derived values.
        rejected: Fields whose values were rejected.
    """
    for name in SECTIONS:
        section = getattr(config, name)
        if not isinstance(section, ChecksItself):
            continue
        try:
            yield from (as_problem(line, name) for line in section.problems(config))
        except Exception:
            # A rejected value may make a check fail. If none was rejected, the check has a bug.
            if not rejected:
                raise


def misspelled_methods(config: ConfigContainer) -> Iterator[Problem]:
    """Yield a problem for each method that nothing calls, since its name is misspelled.

    A method is the user's own if the section also has the method that its name is close to.
    """
    for section, contracts, more in (("model", _OF_MODELS, _MORE), ("dataset", _OF_DATASETS, ())):
        holder = getattr(config, section)
        known = {name for contract in contracts for name in _methods(contract)} | set(more)
        for owner, name in _own_methods(holder):
            near = None if name in known else _meant(name, sorted(known))
            if near is not None and not hasattr(holder, near):
                yield Problem(
                    (f"{section}.{name}",),
                    f"{section}.{name}: {owner} has a method of this name, which nothing calls; "
                    f"did you mean {near}? Rename it, or begin its name with _ if you call it "
                    "yourself",
                )
    model = config.model
    given = [name for name in _methods(ArrangesRanks) if hasattr(model, name)]
    if given and not isinstance(model, ArrangesRanks):
        missing = next(name for name in _methods(ArrangesRanks) if name not in given)
        yield Problem(
            (f"model.{given[0]}",),
            f"model.{given[0]}: is called only with {missing}, which {type(model).__name__} "
            "does not have; define both",
        )


def _meant(name: str, known: list[str]) -> str | None:
    spelled = re.sub(r"(?<![a-z])lr(?![a-z])", "learning_rate", name)
    # Any name with learning_rate in it has many letters of learning_rate_multiplier.
    return nearest(spelled, known, cutoff=_NEAR if spelled == name else _NEAR_SPELLED_OUT)


def _methods(contract: type) -> list[str]:
    return [name for name in vars(contract) if not name.startswith("_")]


def _own_methods(holder: Any) -> Iterator[tuple[str, str]]:
    """Yield class and name of each public method that is not of bridge or megatron-core."""
    classes = type(holder).__mro__[:-1]
    own = [cls for cls in classes if cls.__module__.split(".")[0] not in ("bridge", "megatron")]
    inherited = {name for cls in classes if cls not in own for name in vars(cls)}
    fields = fields_of(holder) if hasattr(holder, "__dataclass_fields__") else {}
    for cls in own:
        for name, value in vars(cls).items():
            is_method = callable(value) or isinstance(value, property | classmethod | staticmethod)
            if is_method and not name.startswith("_") and name not in {*fields, *inherited}:
                yield cls.__name__, name
