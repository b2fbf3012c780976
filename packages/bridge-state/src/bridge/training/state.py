"""The state of a run while it trains: configuration, counters and loggers."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bridge.training.counters import TokenCounter, TrainState
from bridge.training.launchers import rank_environment
from bridge.training.metric_loggers import (
    MetricLogger,
    MetricLoggers,
    TensorBoardLogger,
    WandbLogger,
    open_metric_loggers,
)
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from megatron.core.timers import Timers
    from torch.utils.tensorboard.writer import SummaryWriter
    from wandb import Run

    from bridge.training.config import ConfigContainer


__all__ = ["Evaluation", "GlobalState", "Results", "TrainState"]


@dataclass(kw_only=True)
class Evaluation:
    """The metrics of a split at one step."""

    step: int
    metrics: dict[str, float | None]


@dataclass(kw_only=True)
class Results:
    """The newest metrics of a run; saved with every checkpoint."""

    logged: dict[str, Any] = field(default_factory=dict)
    """The record of the newest logged step, with its "step"."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """The newest evaluation of each split, "validation" and "test"."""


class GlobalState:
    """The state of one run, which the forward step gets. A process may have several, one a run.

    Rank 0 logs, as reduced metrics are equal on every rank. Other ranks have no trackers, and their
    loggers write nothing.
    """

    def __init__(self, cfg: "ConfigContainer") -> None:
        """Hold the resolved configuration `cfg`; nothing is built yet."""
        self.cfg = cfg
        self.train_state = TrainState()
        self.results = Results()
        self._loggers: MetricLoggers | None = None
        self._closed = False

    @cached_property
    def token_counter(self) -> TokenCounter:
        """Counts the tokens of the steps; set-up puts one here that knows the data."""
        return TokenCounter(self.train_state, model=self.cfg.model)

    @cached_property
    def timers(self) -> "Timers":
        """megatron-core's timers, at the level of logger.timing_log_level."""
        from megatron.core.timers import Timers

        return Timers(self.cfg.logger.timing_log_level, "minmax")

    def open_loggers(self, step: int) -> MetricLoggers:
        """Open metrics.jsonl and the trackers in the run's directory.

        `bridge.training.pretrain.pretrain` opens them before the first step. A program with its own
        loop opens them itself if it logs, or if its forward step uses a tracker.

        Args:
            step: Steps that are done. Where checkpoint.resume is set, records and points of later
                steps are removed.

        Raises:
            UsageError: checkpoint.run_dir is not set, or a tracker that was asked for is missing.
        """
        self._check_not_closed()
        if self._loggers is not None:
            raise RuntimeError("the loggers of this GlobalState are open already")
        if not _is_logging_rank():
            self._loggers = MetricLoggers()
        elif self.cfg.checkpoint.run_dir is None:
            raise UsageError(
                "checkpoint.run_dir is not set, so there is nowhere to log: "
                "give the run a directory (pretrain chooses one)"
            )
        else:
            run_dir = Path(self.cfg.checkpoint.run_dir)
            self._loggers = open_metric_loggers(self.cfg, run_dir, step)
        return self._loggers

    @property
    def metric_loggers(self) -> MetricLoggers:
        """Takes the records of metrics to metrics.jsonl and the trackers; see `open_loggers`."""
        self._check_not_closed()
        if self._loggers is None:
            raise RuntimeError("the loggers are not open: call state.open_loggers(step) first")
        return self._loggers

    @property
    def tensorboard_logger(self) -> "SummaryWriter | None":
        """TensorBoard's writer, for everything but the scalars of a step.

        None without logger.tensorboard and on ranks that do not log. It is there once
        `open_loggers` was called.
        """
        logger = self._find(TensorBoardLogger, is_wanted=self.cfg.logger.tensorboard)
        return None if logger is None else logger.writer

    @property
    def wandb_logger(self) -> "Run | None":
        """The W&B run; None without logger.wandb_project and on ranks that do not log.

        It is there once `open_loggers` was called.
        """
        is_wanted = self.cfg.logger.wandb_project is not None
        logger = self._find(WandbLogger, is_wanted=is_wanted)
        return None if logger is None else logger.run

    def close(self, *, failed: bool = False) -> None:
        """Flush and close the loggers; a second call does nothing.

        Args:
            failed: Whether the run ended with an exception (W&B shows it so).
        """
        self._closed = True
        if self._loggers is None:
            return
        if failed and (wandb := self._loggers.find(WandbLogger)) is not None:
            wandb.mark_failed()
        self._loggers.close()

    def _find[Kind: MetricLogger](self, kind: type[Kind], *, is_wanted: bool) -> Kind | None:
        self._check_not_closed()
        return self.metric_loggers.find(kind) if is_wanted and _is_logging_rank() else None

    def _check_not_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this GlobalState is closed, and its loggers with it")


def _is_logging_rank() -> bool:
    """Whether this is rank 0; from the launcher's variables before torch.distributed is up."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return rank_environment().rank == 0
