"""The weights of a checkpoint outside of a run: read one by one, or written all at once.

Names are those of `bridge.training.contracts.NamesWeights`. megatron-core keeps the layers of a
block together in one tensor, ``decoder.layers.mlp.linear_fc1.weight`` of ``[layers, ...]``; here
each layer has a name of its own.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpoint.manifest import write_manifest
from bridge.training.checkpoint.megatron_io import reading, save_sharded
from bridge.training.checkpoint.verification import reject_damaged
from bridge.training.config import ConfigContainer, ConfigError
from bridge.training.run_files.configuration import read_config_text, write_config
from bridge.training.usage_error import UsageError

_OF_A_LAYER = re.compile(r"(?P<block>.*\blayers)\.(?P<layer>\d+)\.(?P<rest>.+)")


class SavedWeights:
    """Reads unsharded weights, under whatever layout they were saved.

    It is used within `bridge.training.ranks.groups.one_process`.

    Args:
        checkpoint: The checkpoint's folder.

    Raises:
        UsageError: It is no checkpoint, or it is damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        from megatron.core import dist_checkpointing

        self._checkpoint = checkpoint
        with reading(checkpoint, "it is no checkpoint, or it is damaged"):
            self._tensors: dict[str, Any] = dist_checkpointing.load_tensors_metadata(
                str(checkpoint)
            )

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a weight, with the rows that pad it; None if there is no weight."""
        key, layer = self._place(name)
        if key not in self._tensors:
            return None
        shape = tuple(self._tensors[key].global_shape)
        if layer is None:
            return shape
        return shape[1:] if layer < shape[0] else None

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which a weight was saved.

        Args:
            name: One for which `shape` is not None.
        """
        dtype: torch.dtype = self._tensors[self._place(name)[0]].dtype
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a weight in the type in which it was saved.

        Args:
            name: One for which `shape` is not None.

        Raises:
            UsageError: The checkpoint is damaged.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        key, layer = self._place(name)
        saved = self._tensors[key]
        shape = saved.global_shape if layer is None else (1, *saved.global_shape[1:])
        wanted = ShardedTensor.from_rank_offsets(
            key,
            torch.empty(shape, dtype=saved.dtype),
            *([] if layer is None else [(0, layer, saved.global_shape[0])]),
        )
        with reading(self._checkpoint, "it is damaged"):
            state: Any = dist_checkpointing.load(
                {name: wanted},
                str(self._checkpoint),
                # Other layers are left unread on purpose.
                validate_access_integrity=False,
            )
        weight: torch.Tensor = state[name]
        return weight if layer is None else weight[0]

    def _place(self, name: str) -> tuple[str, int | None]:
        """Return the tensor of the checkpoint that has the weight, and the weight's index in it."""
        match = _OF_A_LAYER.fullmatch(name)
        if name in self._tensors or match is None:
            return name, None
        return _key_of(match), int(match["layer"])


def write_weights(
    checkpoint: Path, weights: Mapping[str, torch.Tensor], config: ConfigContainer
) -> None:
    """Write a checkpoint with nothing but weights, for runs to start from.

    It is called within `bridge.training.ranks.groups.one_process`.

    Args:
        checkpoint: An empty folder.
        weights: Every weight of the model, unsharded; of each block either all layers or none.
        config: The model's configuration, as far as it is known; saved with the weights.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    matches = {name: _OF_A_LAYER.fullmatch(name) for name in weights}
    layers = Counter(_key_of(match) for match in matches.values() if match)
    state = {}
    for name, weight in weights.items():
        match = matches[name]
        key = _key_of(match) if match else name
        within = [(0, int(match["layer"]), layers[key])] if match else []
        state[name] = ShardedTensor.from_rank_offsets(
            key, weight, *within, prepend_axis_num=len(within)
        )
    save_sharded(state, checkpoint, {"singleton_local_shards": False})
    write_config(checkpoint / "config.yaml", config)
    write_manifest(checkpoint)


def saved_config(checkpoint: Path) -> ConfigContainer:
    """Return the configuration that a checkpoint was saved with.

    That of a run is resolved: values that depend on the device, and the parallel layout, are those
    of the run. For weights that were written alone it is as it was given.

    Raises:
        UsageError: There is none, or it cannot be read.
    """
    path = checkpoint / "config.yaml"
    remedy = "what model the checkpoint holds is not known without it; give another checkpoint"
    reject_damaged(checkpoint)
    try:
        return ConfigContainer.from_yaml(read_config_text(path, remedy, may_lack_end=True))
    except ConfigError as error:
        raise UsageError(
            f"{path}: cannot be read, so what model the checkpoint holds is not known ({error})"
        ) from error


def _key_of(match: re.Match[str]) -> str:
    return f"{match['block']}.{match['rest']}"
