"""run_state.json: what a checkpoint holds besides tensors, of all ranks alike."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpoint.manifest import (
    refuse_missing_manifest,
)
from bridge.training.checkpoint.megatron_io import reading
from bridge.training.state import TrainState
from bridge.training.usage_error import UsageError

FORMAT_VERSION = 2
"""Of the checkpoints that are saved, under the key ``format_version``.

1 (without the key): the state of a distributed optimizer with padding between its gradient buckets
  is that of other weights.
2: it is that of each weight.
"""


RUN_STATE = "run_state.json"


def counters_of(checkpoint: Path) -> TrainState:
    """Return how far a run had come at a checkpoint."""
    counters = TrainState()
    counters.load_state_dict(saved_counters(read_common(checkpoint)))
    return counters


def read_common(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors."""
    from megatron.core import dist_checkpointing

    with reading(checkpoint, "it is no checkpoint of a run, or it is damaged"):
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint))
    # Weights alone have no such file, and of checkpoints of an older form all is in the other.
    path = checkpoint / RUN_STATE
    if path.exists():
        common |= _read_run_state(path)
    if format_version(common) > FORMAT_VERSION:
        raise UsageError(
            f"{checkpoint}: has format version {format_version(common)}, and this version of "
            f"bridge reads versions up to {FORMAT_VERSION}; install the one that saved it"
        )
    if "format_version" in common:
        refuse_missing_manifest(checkpoint)
    return common


def format_version(common: Mapping[str, Any]) -> int:
    """Return the format version of a checkpoint, 1 where it has none."""
    return int(common.get("format_version", 1))


def _read_run_state(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged, take "
            "another checkpoint"
        ) from error


def saved_counters(common: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the counters of a checkpoint, as `TrainState.load_state_dict` takes them."""
    return {name: _counter(value) for name, value in common["train_state"].items()}


def _counter(value: Any) -> torch.Tensor:
    """Return a counter of `TrainState` in the form in which it is loaded."""
    dtype = torch.float64 if isinstance(value, float) else torch.int64
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
