"""The components of a run that train it, also given to a program with its own loop."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpoint.checkpointer import Checkpointer
from bridge.training.config import ConfigContainer
from bridge.training.data.run_data import RunData
from bridge.training.loss.normalization import LossAdapter
from bridge.training.loss.reducer import MetricReducer
from bridge.training.model.frozen import ModelSize
from bridge.training.ranks.groups import Ranks
from bridge.training.run_files.directory import RunDirectory
from bridge.training.state import GlobalState


@dataclass(kw_only=True)
class TrainingParts:
    """The components that `bridge.training.train.train_step` works with."""

    config: ConfigContainer
    """The resolved configuration."""
    ranks: Ranks
    """The process groups."""
    state: GlobalState
    """Counters, which every step advances."""
    data: RunData
    """The data, which gives this rank its iterators."""
    model: list[torch.nn.Module]
    """This rank's model chunks, DDP-wrapped."""
    optimizer: Any
    """megatron-core's optimizer."""
    scheduler: Any
    """megatron-core's LR scheduler."""
    forward_step: LossAdapter
    """The user's forward step, for megatron-core's schedules; its `watch` finds anomalies."""
    reducer: MetricReducer
    """Reduces the metrics of a step or an evaluation over all ranks."""
    directory: RunDirectory
    """The run's files: in checkpoint.run_dir, or under a new name in runs."""
    checkpointer: Checkpointer
    """Saves checkpoints; it has loaded that of checkpoint.resume or of
    checkpoint.pretrained_checkpoint."""
    restored_from: Path | None
    """The checkpoint that the run continues from, None if it starts at step 0."""
    size: ModelSize | None = None
    """Parameters of the model on all ranks, where the run trains adapters."""
    changes: list[str] = field(default_factory=list)
    """A line for each rate that jumps where the run continues, as its configuration changed."""

    def check_losses(self) -> list[str]:
        """Check the losses since the last check; return warnings, the same on every rank.

        A collective and a host-device sync.

        Raises:
            FloatingPointError: The action of an anomaly is to raise; on every rank.
        """
        return self.forward_step.watch.check(self.config.train, self.ranks.control_group)
