"""Parameter-efficient fine-tuning: from a built model to one of which only adapters train.

The order is fixed: the base's weights, then the adapters beside them, then (by the checkpointer)
the adapters' state. Afterwards the base is what it was, and checkpoints hold nothing of it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
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


def find_base(config: ConfigContainer, ranks: Ranks, checkpoint: Path | None) -> Base:
    """Describe the weights that the adapters stand beside, the same on every rank.

    Args:
        config: The resolved configuration; the exact checkpoint is filled in, since a run that it
            may name goes on to newer ones.
        ranks: The process groups.
        checkpoint: The checkpoint of the base; None for initial weights.

    Raises:
        UsageError: The base would be initial weights that another layout has not.
    """
    if checkpoint is None and not config.rng.layout_invariant_init:
        raise UsageError(
            "checkpoint.pretrained_checkpoint: adapters need weights to stand beside; give a run's "
            "directory or one of its checkpoints (initial weights serve for trying out, with "
            "rng.layout_invariant_init=true)"
        )
    if checkpoint is not None:
        config.checkpoint.pretrained_checkpoint = str(checkpoint.resolve())
    return on_first_rank(lambda: Base.of(config, checkpoint), ranks.control_group)


def attach_adapters(
    method: PEFTMethod,
    config: ConfigContainer,
    ranks: Ranks,
    chunks: list[Any],
    checkpoint: Path | None,
) -> Sequence[AdaptedLayer]:
    """Load the base's weights and put adapters beside them; return the layers that got one.

    Args:
        method: The run's section peft.
        config: The resolved configuration.
        ranks: The process groups.
        chunks: This rank's model chunks, before DDP.
        checkpoint: The checkpoint of the base; None keeps the initial weights.

    Raises:
        UsageError: The checkpoint or the method's fields do not fit the model.
    """
    if checkpoint is not None:
        load_model_weights(chunks, checkpoint, ranks)
    layers = method.attach(chunks, ranks.control_group)
    if config.rng.layout_invariant_init:
        added = [parameter for chunk in chunks for _, parameter in trained_parameters(chunk)]
        initialize_added_weights(chunks, added, config.rng.seed, ranks.model.groups)
    return layers


def notes(
    method: PEFTMethod, layers: Sequence[AdaptedLayer], size: ModelSize, base: Base, ranks: Ranks
) -> Iterator[str]:
    """Yield lines about what is adapted, and how much of the model trains; a collective.

    Args:
        method: The run's section peft.
        layers: The adapted layers of this rank.
        size: Of the model on all ranks.
        base: The frozen weights.
        ranks: The process groups.
    """
    everywhere = from_every_rank([layer.name for layer in layers], ranks.control_group)
    names = sorted({name for of_rank in everywhere for name in of_rank})
    kinds = Counter(name.rpartition(".")[2] for name in names)
    yield (
        f"{method.method} adapts {len(names)} layers: "
        + ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    )
    share = 100 * size.trained / size.whole
    yield f"{method.method} trains {size.trained:,} of {size.whole:,} parameters ({share:.3g} %)"
    yield f"beside {base.place}"
    if base.is_random:
        yield (
            "warning: the adapters stand beside random weights; give a trained model in "
            "checkpoint.pretrained_checkpoint"
        )
