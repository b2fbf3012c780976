"""The weights of a model in a checkpoint, loaded into chunks or saved from them."""

from pathlib import Path
from typing import Any

from bridge.training.checkpoint.base import Base
from bridge.training.checkpoint.manifest import write_manifest
from bridge.training.checkpoint.megatron_io import (
    extra_states,
    keep_extra_states,
    load_sharded,
    save_sharded,
)
from bridge.training.checkpoint.run_state import FORMAT_VERSION, read_common
from bridge.training.checkpoint.safe_loading import restricted_loading
from bridge.training.config import ConfigContainer
from bridge.training.model.frozen import load_trained, only_trained
from bridge.training.ranks.groups import Ranks
from bridge.training.ranks.launcher_store import is_logging_rank
from bridge.training.run_files.configuration import write_config
from bridge.training.usage_error import UsageError


def load_model_weights(chunks: list[Any], checkpoint: Path, ranks: Ranks) -> None:
    """Load a model's weights from a checkpoint of a run or of weights alone.

    Args:
        chunks: This rank's model chunks, not in DDP.
        checkpoint: The checkpoint's folder.
        ranks: The process groups.

    Raises:
        UsageError: The checkpoint does not fit the model, or holds adapters alone.
    """
    if "base" in read_common(checkpoint):
        raise UsageError(
            f"{checkpoint}: holds adapters and not the model that they are on top of; make one of "
            f"both first: bridge merge {checkpoint} --output DIR"
        )
    metadata = {"singleton_local_shards": False, "dp_cp_group": ranks.model.groups.dp_cp}
    named = named_chunks(chunks)
    wanted = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in named.items()}
    for entries in wanted.values():
        keep_extra_states(entries, checkpoint)
    state = load_sharded(checkpoint, wanted)
    with restricted_loading(checkpoint, extra_states(state)):
        for name, chunk in named.items():
            chunk.load_state_dict(state[name])


def load_adapters(chunks: list[Any], checkpoint: Path, base: Base | None, ranks: Ranks) -> str:
    """Load the state of adapters from a run's checkpoint; return the place that their base had.

    Args:
        chunks: This rank's model chunks with adapters attached, not in DDP.
        checkpoint: The checkpoint's folder.
        base: Their base weights; None accepts any.
        ranks: The process groups.

    Raises:
        UsageError: The checkpoint does not fit, or belongs to another base.
    """
    saved = read_common(checkpoint).get("base")
    if saved is None:
        raise UsageError(
            f"{checkpoint}: holds a full model and no adapters; give the "
            "checkpoint of a run with peft"
        )
    if base is not None:
        base.reject_other_weights(saved, checkpoint)
    metadata = {"singleton_local_shards": True, "dp_cp_group": ranks.model.groups.dp_cp}
    named = named_chunks(chunks)
    state = load_sharded(
        checkpoint,
        {
            name: only_trained(chunk.sharded_state_dict(metadata=metadata))
            for name, chunk in named.items()
        },
    )
    with restricted_loading(checkpoint, extra_states(state)):
        for name, chunk in named.items():
            load_trained(chunk, state.get(name, {}))
    return str(saved["place"])


def save_model_weights(
    chunks: list[Any], checkpoint: Path, config: ConfigContainer, ranks: Ranks
) -> None:
    """Write a checkpoint with nothing but the model's weights, for runs to start from.

    Args:
        chunks: This rank's model chunks, not in DDP.
        checkpoint: An empty folder.
        config: Saved with the weights.
        ranks: The process groups.
    """
    content = {"singleton_local_shards": False}
    metadata = {**content, "dp_cp_group": ranks.model.groups.dp_cp}
    state = {
        "format_version": FORMAT_VERSION,
        **{
            name: chunk.sharded_state_dict(metadata=metadata)
            for name, chunk in named_chunks(chunks).items()
        },
    }
    save_sharded(state, checkpoint, content, ranks.control_group)
    if is_logging_rank():
        write_config(checkpoint / "config.yaml", config)
        write_manifest(checkpoint)


def named_chunks(chunks: list[Any]) -> dict[str, Any]:
    """Return model chunks by their keys in a checkpoint."""
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{index}": chunk for index, chunk in enumerate(chunks)}
