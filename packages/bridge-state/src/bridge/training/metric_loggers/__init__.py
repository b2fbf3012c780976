"""Metric loggers: metrics.jsonl, TensorBoard and Weights & Biases, with one call a record.

Each backend gets the same names and values. A step may have several records (its training metrics,
then its validation metrics) as long as no name repeats; a step never goes back. JSONL writes one
line a record; TensorBoard one point a name; W&B one row a record, with the step in its column
"step".

Each writer has a file of its own and is listed in `_WRITERS`. Its ``of_run`` opens it as the
configuration asks for. The trackers are imported only by the class that needs them.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.training.metric_loggers.base import MetricLogger, MetricLoggers
from bridge.training.metric_loggers.jsonl import JsonlLogger, read_records, truncate_jsonl
from bridge.training.metric_loggers.tensorboard import TensorBoardLogger
from bridge.training.metric_loggers.wandb import WandbLogger

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer

__all__ = [
    "JsonlLogger",
    "MetricLogger",
    "MetricLoggers",
    "TensorBoardLogger",
    "WandbLogger",
    "open_metric_loggers",
    "read_records",
    "truncate_jsonl",
]

_WRITERS = (JsonlLogger, TensorBoardLogger, WandbLogger)


def open_metric_loggers(config: "ConfigContainer", run_dir: Path, step: int) -> MetricLoggers:
    """Open the loggers that a run asks for.

    Args:
        config: The run. Where it is resumed, records and points of steps after `step` are removed.
        run_dir: The run's directory.
        step: Steps that are done.

    Raises:
        UsageError: A tracker that was asked for is missing or cannot start.
    """
    # An evaluation may come before step 1, as step 0.
    first_step = step + 1 if step else 0
    with ExitStack() as opened:
        loggers: list[MetricLogger] = []
        for writer in _WRITERS:
            logger = writer.of_run(config, run_dir, first_step)
            if logger is not None:
                opened.callback(logger.close)
                loggers.append(logger)
        opened.pop_all()
    return MetricLoggers(loggers)
