"""run_state.json: the content of a checkpoint that is no tensor and the same on all ranks."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpoint.megatron_io import reading
from bridge.training.checkpoint.verification import reject_missing_manifest
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
"""The file of the evaluations that came after the checkpoint was saved, outside of the manifest."""

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
    step = int(common["train_state"]["step"])
    try:
        newest = {split: _evaluation(content, step) for split, content in evaluations.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"{later}: holds no evaluations ({error}); {_REMEDY}") from error
    return Results(logged=dict(saved.get("logged", {})), evaluations=newest)


def write_evaluations(path: Path, results: Results) -> None:
    """Write the newest evaluations of a run next to the files of a checkpoint."""
    evaluations = dataclasses.asdict(results)["evaluations"]
    replace_durably(path, json.dumps(evaluations, indent=2) + "\n")


def format_version(common: Mapping[str, Any]) -> int:
    """Return the format version of a checkpoint, 1 where it has none."""
    return int(common.get("format_version", 1))


def _evaluation(content: Any, last_step: int) -> Evaluation:
    """Return an evaluation that was saved; its file may be damaged, or of another checkpoint.

    Raises:
        TypeError: It is no evaluation.
        ValueError: It is of a step after the checkpoint.
    """
    evaluation = Evaluation(**content)
    step, metrics = evaluation.step, evaluation.metrics
    if not isinstance(step, int) or not isinstance(metrics, dict):
        raise TypeError("it has no step with metrics")
    for name, value in metrics.items():
        if not isinstance(value, int | float | None):
            raise TypeError(f"{name!r} is no number")
    if step > last_step:
        raise ValueError(f"it is of step {step}, and the checkpoint of step {last_step}")
    return evaluation


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
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
