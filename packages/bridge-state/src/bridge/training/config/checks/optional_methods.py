"""Methods that a model or dataset section may have, and names that were probably meant for them."""

import re
from collections.abc import Iterator
from typing import Any

from bridge.training.config.container import ConfigContainer
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
# Those that are looked for elsewhere: validation.CanBeFinalized, throughput.CountsFlops.
_MORE = ("finalized", "training_flops_per_token", "weight_gradient_flops_per_token")
_OF_DATASETS = (DatasetConfig, ChecksItself)
_NEAR, _NEAR_SPELT_OUT = 0.65, 0.8


def misspelt_methods(config: ConfigContainer) -> Iterator[str]:
    """Yield a line for each method of the user's that nothing calls, as its name is almost right.

    A method whose name is near to one that the section has as well is taken for the user's own.
    """
    for section, contracts, more in (("model", _OF_MODELS, _MORE), ("dataset", _OF_DATASETS, ())):
        holder = getattr(config, section)
        known = {name for contract in contracts for name in _methods(contract)} | set(more)
        for owner, name in _own_methods(holder):
            near = None if name in known else _meant(name, sorted(known))
            if near is not None and not hasattr(holder, near):
                yield (
                    f"{section}.{name}: {owner} has a method of this name, which nothing calls; "
                    f"did you mean {near}? Rename it, or begin its name with _ if you call it "
                    "yourself"
                )
    model = config.model
    given = [name for name in _methods(ArrangesRanks) if hasattr(model, name)]
    if given and not isinstance(model, ArrangesRanks):
        missing = next(name for name in _methods(ArrangesRanks) if name not in given)
        yield (
            f"model.{given[0]}: is called only with {missing}, which {type(model).__name__} "
            "does not have; define both"
        )


def _meant(name: str, known: list[str]) -> str | None:
    spelt = re.sub(r"(?<![a-z])lr(?![a-z])", "learning_rate", name)
    # What is spelt out has many letters of learning_rate_multiplier, whatever it is.
    return nearest(spelt, known, cutoff=_NEAR if spelt == name else _NEAR_SPELT_OUT)


def _methods(contract: type) -> list[str]:
    return [name for name in vars(contract) if not name.startswith("_")]


def _own_methods(holder: Any) -> Iterator[tuple[str, str]]:
    """Yield class and name of each public method that is neither ours nor megatron-core's."""
    classes = type(holder).__mro__[:-1]
    own = [cls for cls in classes if cls.__module__.split(".")[0] not in ("bridge", "megatron")]
    inherited = {name for cls in classes if cls not in own for name in vars(cls)}
    fields = fields_of(holder) if hasattr(holder, "__dataclass_fields__") else {}
    for cls in own:
        for name, value in vars(cls).items():
            is_method = callable(value) or isinstance(value, property | classmethod | staticmethod)
            if is_method and not name.startswith("_") and name not in {*fields, *inherited}:
                yield cls.__name__, name
