"""run_state.json: the content of a checkpoint that is no tensor and the same on all ranks."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpoint.manifest import reject_missing_manifest
from bridge.training.checkpoint.megatron_io import reading
from bridge.training.durable_files import replace_durably
from bridge.training.state import Evaluation, Results, TrainState
from bridge.training.usage_error import UsageError

FORMAT_VERSION = 2
"""Of the checkpoints that are saved, under the key ``format_version``.

1 (without the key): the state of a distributed optimizer with padding between its gradient buckets
  is that of other weights.
2: it is that of each weight.
"""

RUN_STATE = "run_state.json"

EVALUATIONS = "evaluations.json"
"""The file of evaluations that came after the checkpoint was saved. The manifest does not have it.
"""

_REMEDY = "remove it to evaluate again"


def counters_of(checkpoint: Path) -> TrainState:
    """Return the counters of a run at a checkpoint."""
    counters = TrainState()
    counters.load_state_dict(saved_counters(read_common(checkpoint)))
    return counters


def read_common(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint that is no tensor and the same on all ranks."""
    from megatron.core import dist_checkpointing

    with reading(checkpoint, "it is no checkpoint of a run, or it is damaged"):
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint))
    # Weights alone have no such file, and of checkpoints of an older form all is in the other.
    path = checkpoint / RUN_STATE
    if path.exists():
        common |= _read_json(path, "take another checkpoint")
    if format_version(common) > FORMAT_VERSION:
        raise UsageError(
            f"{checkpoint}: has format version {format_version(common)}, and this version of "
            f"bridge reads versions up to {FORMAT_VERSION}; install the one that saved it"
        )
    if "format_version" in common:
        reject_missing_manifest(checkpoint)
    return common


def saved_results(checkpoint: Path, common: Mapping[str, Any]) -> Results:
    """Return the newest metrics that a checkpoint holds; older checkpoints hold none.

    Args:
        checkpoint: Its folder.
        common: Its content from `read_common`.

    Raises:
        UsageError: The file of later evaluations is damaged.
    """
    saved = common.get("results", {})
    evaluations = dict(saved.get("evaluations", {}))
    later = checkpoint / EVALUATIONS
    if later.exists():
        evaluations |= _read_json(later, _REMEDY)
    try:
        newest = {split: Evaluation(**found) for split, found in evaluations.items()}
    except TypeError as error:
        raise UsageError(f"{later}: holds no evaluations ({error}); {_REMEDY}") from error
    return Results(logged=dict(saved.get("logged", {})), evaluations=newest)


def write_evaluations(path: Path, results: Results) -> None:
    """Write the newest evaluations of a run next to the files of a checkpoint."""
    evaluations = dataclasses.asdict(results)["evaluations"]
    replace_durably(path, json.dumps(evaluations, indent=2) + "\n")


def format_version(common: Mapping[str, Any]) -> int:
    """Return the format version of a checkpoint, 1 where it has none."""
    return int(common.get("format_version", 1))


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged, "
            f"{remedy}"
        ) from error


def saved_counters(common: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the counters of a checkpoint, as `TrainState.load_state_dict` takes them."""
    return {name: _counter(value) for name, value in common["train_state"].items()}


def _counter(value: Any) -> torch.Tensor:
    """Return a counter of `TrainState` in the form in which it is loaded."""
    dtype = torch.float64 if isinstance(value, float) else torch.int64
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
