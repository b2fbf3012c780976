"""A model with trained adapters, rebuilt by one process outside of a run."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.model_parallel_config import ModelParallelConfig

from bridge.training.adapters import find_base
from bridge.training.checkpoint.model_weights import (
    load_adapters,
    load_model_weights,
    save_model_weights,
)
from bridge.training.checkpoint.verification import verified
from bridge.training.config import ConfigContainer, ConfigError
from bridge.training.config.resolution import resolve_collecting
from bridge.training.contracts import AdaptedLayer, PEFTMethod
from bridge.training.megatron_import import expected_messages_held_back
from bridge.training.model.building import build_chunks, count_parameters
from bridge.training.ranks.groups import Ranks, choose_device, ranks_of
from bridge.training.ranks.seeding import seed_stage
from bridge.training.run_files.directory import find_checkpoint
from bridge.training.usage_error import UsageError

_ONE_RANK: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """A model of one process, with trained adapters in it."""

    config: ConfigContainer
    """Of the run that trained them, for one rank."""
    method: PEFTMethod
    chunks: list[Any]
    layers: Sequence[AdaptedLayer]
    base: str
    """The place of the base weights during training."""
    ranks: Ranks


@contextlib.contextmanager
def adapted_model(
    checkpoint: Path,
    config: ConfigContainer,
    base: str | None = None,
    *,
    adapters_alone: bool = False,
) -> Iterator[AdaptedModel]:
    """Rebuild, on the CPU, the model that a run of adapters has trained.

    Args:
        checkpoint: One of that run.
        config: Saved with it.
        base: The run or checkpoint of the base weights; None for their place during training.
        adapters_alone: Look for no base; the other weights have any values.

    Raises:
        UsageError: There are no adapters, or the base is not there or is another one.
    """
    if config.peft is None:
        raise UsageError(
            f"{checkpoint}: holds a full model and no adapters; give the "
            "checkpoint of a run with peft"
        )
    config = _of_one_rank(config)
    weights = None if adapters_alone else _find_weights(config, base)
    choose_device("cpu")
    read = [checkpoint] if weights is None else [checkpoint, weights]
    with (
        verified(*read),
        expected_messages_held_back(),
        ranks_of(config, "cpu") as ranks,
    ):
        seed_stage(config.rng.seed, ranks)
        is_random = weights is None and not adapters_alone
        chunks = build_chunks(config, ranks, loaded_next=not is_random)
        found = None if adapters_alone else find_base(config, ranks, weights)
        if weights is not None:
            load_model_weights(chunks, weights, ranks)
        assert config.peft is not None
        layers = config.peft.attach(chunks)
        yield AdaptedModel(
            config=config,
            method=config.peft,
            chunks=chunks,
            layers=layers,
            base=load_adapters(chunks, checkpoint, found, ranks),
            ranks=ranks,
        )


def merge(checkpoint: Path, config: ConfigContainer, output: Path, base: str | None = None) -> int:
    """Write the model that adapters and base are together; return its number of parameters.

    Args:
        checkpoint: One of the run that trained the adapters.
        config: Saved with it.
        output: An empty folder, which becomes a checkpoint of the model's weights.
        base: As for `adapted_model`.
    """
    with adapted_model(checkpoint, config, base) as adapted:
        adapted.method.merge(adapted.chunks)
        merged = config.copy()
        merged.peft = None
        merged.checkpoint.pretrained_checkpoint = None
        save_model_weights(adapted.chunks, output, merged, adapted.ranks)
        return count_parameters(adapted.chunks)


def _find_weights(config: ConfigContainer, base: str | None) -> Path | None:
    """Return the checkpoint of the base; None for initial weights."""
    place = base or config.checkpoint.pretrained_checkpoint
    if place is None:
        return None
    return find_checkpoint(place, "--base" if base else "the base (--base, if it was moved)")


def _of_one_rank(config: ConfigContainer) -> ConfigContainer:
    config = config.copy()
    if isinstance(config.model, ModelParallelConfig):
        for name, value in _ONE_RANK.items():
            if hasattr(config.model, name):
                setattr(config.model, name, value)
    resolved, problems = resolve_collecting(config, device="cpu", world_size=1)
    # Nothing is trained, so problems of the data or of batch sizes do not matter.
    if of_model := [p for p in problems if p.blamed.partition(".")[0] in ("model", "peft")]:
        raise ConfigError(of_model)
    return resolved
