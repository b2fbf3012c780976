"""TensorBoard: scalars in event files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


class TensorBoardLogger:
    """Scalars in TensorBoard's event files (which hold them in float32)."""

    def __init__(self, directory: str | os.PathLike[str], *, purge_step: int | None = None) -> None:
        """Open a new event file in ``directory``.

        Args:
            directory: Where the event files are.
            purge_step: First step that a resumed run writes again: earlier files' points from
                there on are hidden. None for a new run.

        Raises:
            UsageError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "logger.tensorboard=true needs TensorBoard, which is not installed: "
                'pip install "bridge-state[tensorboard]", or set logger.tensorboard=false'
            ) from error
        self.writer: SummaryWriter = SummaryWriter(os.fspath(directory), purge_step=purge_step)
        self._closed = False

    @classmethod
    def of_run(cls, config: "ConfigContainer", run_dir: Path, first_step: int) -> Self | None:
        """Open the event file of a run, if it asks for TensorBoard; see `open_metric_loggers`."""
        if not config.logger.tensorboard:
            return None
        purge_step = first_step if config.checkpoint.resume else None
        return cls(run_dir / "tensorboard", purge_step=purge_step)

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Add one point to each name's curve."""
        for name, value in metrics.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        # Records are many steps apart; without a flush a curve would lack its last point.
        self.writer.flush()

    def sync(self) -> None:
        """Do nothing: every record is flushed."""

    def close(self) -> None:
        """Write out the last points and close the event file."""
        if not self._closed:
            self._closed = True
            self.writer.close()
