"""What a run knows while it trains: its counters, its configuration and where it logs."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bridge.training.launchers import rank_environment
from bridge.training.metric_loggers import (
    JsonlLogger,
    MetricLogger,
    MetricLoggers,
    TensorBoardLogger,
    WandbLogger,
    truncate_jsonl,
)
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from megatron.core.timers import Timers
    from torch.utils.tensorboard.writer import SummaryWriter
    from wandb import Run

    from bridge.training.config import ConfigContainer


@dataclass(kw_only=True)
class TrainState:
    """How far a run has come; saved with every checkpoint. Counts are over all ranks."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_train_samples: int = 0
    """Training samples drawn; the position in the data."""
    skipped_train_samples: int = 0
    """Those of them whose step was skipped."""
    consumed_validation_samples: int = 0
    """Validation samples evaluated, over all evaluations."""
    consumed_tokens: int = 0
    """Tokens trained on: what the data counts as tokens (`DataSplits.items`), else model.seq_length
    of a sample, else what the loss function returns as num_tokens (in its steps up to the newest
    that was logged or saved), else the samples."""
    floating_point_operations_so_far: float = 0.0
    """Model FLOPs of all training steps."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return each counter as a 0-dim CPU tensor: int64, the FLOPs float64."""
        return {
            field.name: torch.tensor(getattr(self, field.name), dtype=_dtype(field.name))
            for field in fields(self)
        }

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take over the counters of `state_dict`.

        Raises:
            UsageError: A counter is missing, unknown, or of a type that has lost precision.
        """
        names = {field.name for field in fields(self)}
        if state_dict.keys() != names:
            raise UsageError(
                "the saved train state does not fit: "
                f"missing {sorted(names - state_dict.keys())}, "
                f"unknown {sorted(state_dict.keys() - names)}"
            )
        for name, value in state_dict.items():
            if value.dtype != _dtype(name):
                raise UsageError(f"train state {name} is {value.dtype}, not {_dtype(name)}")
        for name, value in state_dict.items():
            setattr(self, name, value.item())


class GlobalState:
    """The state of one run, handed to the forward step; there is one for each run, not process.

    Timers and loggers are built when they are first asked for. Rank 0 logs, and the loggers of
    other ranks are empty or None: reduced metrics are equal on every rank.
    """

    def __init__(self, cfg: "ConfigContainer") -> None:
        """Hold the resolved configuration `cfg`; nothing is built yet."""
        self.cfg = cfg
        self.train_state = TrainState()
        self._resources = ExitStack()
        self._wandb: WandbLogger | None = None
        self._closed = False

    @cached_property
    def timers(self) -> "Timers":
        """megatron-core's timers, at the level of logger.timing_log_level."""
        from megatron.core.timers import Timers

        return Timers(self.cfg.logger.timing_log_level, "minmax")

    @cached_property
    def metric_loggers(self) -> MetricLoggers:
        """Takes the rows of metrics to metrics.jsonl and the trackers; no-op on other ranks.

        On resume, ask for it after the checkpoint is loaded: rows and points of later steps than
        `train_state.step` are then removed.

        Raises:
            UsageError: checkpoint.run_dir is not set, or a tracker that was asked for is missing.
        """
        self._check_open()
        if not _is_logging_rank():
            return MetricLoggers()
        path = self._run_dir / "metrics.jsonl"
        if self.cfg.checkpoint.resume:
            truncate_jsonl(path, self._first_new_step - 1)
        jsonl = JsonlLogger(path)
        self._resources.callback(jsonl.close)
        loggers: list[MetricLogger | None] = [jsonl, self._tensorboard_logger, self._wandb_logger]
        return MetricLoggers([logger for logger in loggers if logger is not None])

    @property
    def tensorboard_logger(self) -> "SummaryWriter | None":
        """TensorBoard's writer, for what is not a scalar of a step; None where nothing logs."""
        self._check_open()
        return self._tensorboard_logger.writer if self._tensorboard_logger else None

    @property
    def wandb_logger(self) -> "Run | None":
        """The W&B run; None without logger.wandb_project and on ranks that do not log."""
        self._check_open()
        return self._wandb_logger.run if self._wandb_logger else None

    def close(self, *, failed: bool = False) -> None:
        """Flush and close all that was built; a second call does nothing.

        Args:
            failed: Whether the run ended with an exception (W&B shows it so).
        """
        self._closed = True
        if failed and self._wandb is not None:
            self._wandb.mark_failed()
        self._resources.close()

    @cached_property
    def _tensorboard_logger(self) -> TensorBoardLogger | None:
        if not (self.cfg.logger.tensorboard and _is_logging_rank()):
            return None
        purge_step = self._first_new_step if self.cfg.checkpoint.resume else None
        logger = TensorBoardLogger(self._run_dir / "tensorboard", purge_step=purge_step)
        self._resources.callback(logger.close)
        return logger

    @cached_property
    def _wandb_logger(self) -> WandbLogger | None:
        settings = self.cfg.logger
        if settings.wandb_project is None or not _is_logging_rank():
            return None
        self._wandb = WandbLogger(
            self._run_dir,
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            name=settings.wandb_name,
            config=self.cfg.to_dict(),
        )
        self._resources.callback(self._wandb.close)
        return self._wandb

    @property
    def _run_dir(self) -> Path:
        if self.cfg.checkpoint.run_dir is None:
            raise UsageError(
                "checkpoint.run_dir is not set, so there is nowhere to log: "
                "give the run a directory (pretrain chooses one)"
            )
        return Path(self.cfg.checkpoint.run_dir)

    @property
    def _first_new_step(self) -> int:
        """The first step that this process writes; 0 where an evaluation comes before step 1."""
        return self.train_state.step + 1 if self.train_state.step else 0

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this GlobalState is closed: its loggers have written their last")


def _is_logging_rank() -> bool:
    """Say whether this is rank 0, which the launcher tells before torch.distributed is up."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return rank_environment().rank == 0


def _dtype(name: str) -> torch.dtype:
    return torch.float64 if name == "floating_point_operations_so_far" else torch.int64
