"""Parameter-efficient fine-tuning: adapters are put on top of a model's frozen base weights.

The order is fixed: the base weights, then the adapters on top of them, then (by the checkpointer)
the adapters' state. The base does not change, and checkpoints do not hold it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.training.checkpoint.base import Base
from bridge.training.checkpoint.model_weights import load_model_weights
from bridge.training.config import ConfigContainer
from bridge.training.contracts import AdaptedLayer, PEFTMethod
from bridge.training.model.frozen import ModelSize, trained_parameters
from bridge.training.model.initial_weights import initialize_added_weights
from bridge.training.ranks.collectives import from_every_rank, on_first_rank
from bridge.training.ranks.groups import Ranks
from bridge.training.usage_error import UsageError


@dataclass(kw_only=True)
class Adapters:
    """The adapters that a run trains."""

    method: PEFTMethod
    """The run's section peft."""
    base: Base
    """The frozen weights that they are on top of."""
    layers: Sequence[AdaptedLayer] = ()
    """The adapted layers of this rank."""


def find_base(config: ConfigContainer, ranks: Ranks, checkpoint: Path | None) -> Base:
    """Identify the base weights of adapters, the same on every rank.

    Args:
        config: The resolved configuration. The exact checkpoint is filled in: where it names a run,
            the run may save newer ones.
        ranks: The process groups.
        checkpoint: The checkpoint of the base; None for initial weights.

    Raises:
        UsageError: The base would be initial weights that depend on the layout.
    """
    if checkpoint is None and not config.rng.layout_invariant_init:
        raise UsageError(
            "checkpoint.pretrained_checkpoint: adapters need base weights; give a run's directory "
            "or one of its checkpoints (initial weights serve for trying out, with "
            "rng.layout_invariant_init=true)"
        )
    if checkpoint is not None:
        config.checkpoint.pretrained_checkpoint = str(checkpoint.resolve())
    return on_first_rank(lambda: Base.of(config, checkpoint), ranks.control_group)


def attach_adapters(
    adapters: Adapters,
    config: ConfigContainer,
    ranks: Ranks,
    chunks: list[Any],
    checkpoint: Path | None,
) -> None:
    """Load the base weights and put adapters on top of them.

    Args:
        adapters: Gets the adapted layers.
        config: The resolved configuration.
        ranks: The process groups.
        chunks: This rank's model chunks, before DDP.
        checkpoint: The checkpoint of the base; None keeps the initial weights.

    Raises:
        UsageError: The checkpoint or the method's fields do not fit the model.
    """
    if checkpoint is not None:
        load_model_weights(chunks, checkpoint, ranks)
    adapters.layers = adapters.method.attach(chunks, ranks.control_group)
    if config.rng.layout_invariant_init:
        added = [parameter for chunk in chunks for _, parameter in trained_parameters(chunk)]
        initialize_added_weights(chunks, added, config.rng.seed, ranks.model.groups)


def describe_adapters(adapters: Adapters, size: ModelSize, ranks: Ranks) -> Iterator[str]:
    """Yield lines about the adapted layers, and how much of the model trains; a collective.

    Args:
        adapters: Those of this rank.
        size: Parameters of the model on all ranks.
        ranks: The process groups.
    """
    method = adapters.method.method
    everywhere = from_every_rank([layer.name for layer in adapters.layers], ranks.control_group)
    names = sorted({name for of_rank in everywhere for name in of_rank})
    kinds = Counter(name.rpartition(".")[2] for name in names)
    yield (
        f"{method} adapts {len(names)} layers: "
        + ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    )
    percent = 100 * size.trained / size.total
    yield f"{method} trains {size.trained:,} of {size.total:,} parameters ({percent:.3g} %)"
    yield f"on top of {adapters.base.place}"
    if adapters.base.is_random:
        yield (
            "warning: the adapters are on top of random weights; give a trained model in "
            "checkpoint.pretrained_checkpoint"
        )
