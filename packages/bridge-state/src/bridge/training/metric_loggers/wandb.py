"""Weights & Biases: the records of one W&B run, which a resumed run continues."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bridge.training.durable_files import replace_durably
from bridge.training.metric_loggers.wandb_history import written_rows
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from wandb import Run

    from bridge.training.config import ConfigContainer

# W&B's own rule, and no U+FFFD, which stands for bytes that are no text.
_WANDB_ID = re.compile(r"[^/\\#?%:\x00-\x1f\x7f\ufffd]{1,128}")
_ID_REMEDY = (
    "write the id of the W&B run into it (it is in the names wandb/*run-*-ID), or remove it for a "
    "new W&B run"
)


class WandbLogger:
    """Rows of one Weights & Biases run, which a resumed run continues under the same id.

    The id is in ``run_dir/wandb/run_id``. ``WANDB_MODE=offline`` works, also on resume; each start
    has its own folder under ``run_dir/wandb``. A record becomes one row of W&B, committed when it
    is logged, so a run that is killed keeps it. Rows of steps that a resumed run repeats are in W&B
    already and are not written twice. The axis of all curves is the column "step"; W&B's own
    ``_step`` counts rows.
    """

    _FLUSH_SECONDS = 0.1

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        project: str,
        entity: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Start or continue the W&B run of ``run_dir``.

        Args:
            run_dir: The run's directory; W&B's files go to its subfolder ``wandb``.
            project: The W&B project.
            entity: The team or user that owns it; W&B's default if None.
            name: The run's name; the name of ``run_dir`` if None.
            config: Shown as the run's configuration.

        Raises:
            UsageError: wandb is not installed, it cannot start (no API key, say), or the id of the
                run's W&B run cannot be read.
        """
        try:
            import wandb
        except ImportError as error:
            raise UsageError(
                f"logger.wandb_project={project!r} needs wandb, which is not installed: "
                'pip install "bridge-state[wandb]"'
            ) from error
        folder = Path(run_dir).absolute()
        id_file = folder / "wandb" / "run_id"
        known_id = _saved_wandb_id(id_file)
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        try:
            self.run: Run = wandb.init(
                project=project,
                entity=entity,
                name=name or folder.name,
                id=known_id,
                resume="allow" if known_id else None,
                dir=folder,
                config=dict(config or {}),
                # The process that writes the files buffers 15 seconds of rows by default, and ends
                # without writing them when this one is killed.
                settings=wandb.Settings(x_transaction_log_flush_interval=self._FLUSH_SECONDS),
            )
        except wandb.errors.UsageError as error:
            raise UsageError(
                f"logger.wandb_project={project!r}: {error}; log in with `wandb login`, "
                "or set WANDB_MODE=offline"
            ) from error
        replace_durably(id_file, f"{self.run.id}\n")
        self.run.define_metric("*", step_metric="step")
        self._written = written_rows(folder / "wandb") if known_id else []
        # Where the files of earlier starts are not on this machine, W&B knows how many rows it has.
        newest = self._written[-1].number + 1 if self._written else 0
        self._number = max(newest, self.run.step)
        self._is_synced = True
        self._exit_code = 0
        self._closed = False

    @classmethod
    def of_run(cls, config: "ConfigContainer", run_dir: Path, first_step: int) -> Self | None:
        """Open the W&B run of a run, if it asks for W&B; see `open_metric_loggers`."""
        settings = config.logger
        if settings.wandb_project is None:
            return None
        return cls(
            run_dir,
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            name=settings.wandb_name,
            config=config.to_dict(),
        )

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Commit one row, unless an earlier start has."""
        present = {name: value for name, value in metrics.items() if value is not None}
        if not present or self._is_written(present, step):
            return
        self.run.log({"step": step, **present}, step=self._number, commit=True)
        self._number += 1
        self._is_synced = False

    def sync(self) -> None:
        """Wait until the rows are in W&B's file, from which ``wandb sync`` can send them."""
        if not self._is_synced:
            # W&B's process answers after it has taken the rows that were sent before.
            self.run.status()
            time.sleep(2 * self._FLUSH_SECONDS)
            self._is_synced = True

    def _is_written(self, metrics: Mapping[str, float], step: int) -> bool:
        return any(row.step == step and row.names >= metrics.keys() for row in self._written)

    def mark_failed(self) -> None:
        """Let W&B show the run as failed when it is closed."""
        self._exit_code = 1

    def close(self) -> None:
        """Finish the W&B run."""
        if not self._closed:
            self._closed = True
            # A rank that was forked ends before the process that writes the file has done so.
            self.sync()
            self.run.finish(exit_code=self._exit_code)


def _saved_wandb_id(path: Path) -> str | None:
    """Return the id of the W&B run that a file names; None if there is no file.

    Raises:
        UsageError: It cannot be read, or is no id: rows would go to another W&B run.
    """
    try:
        text = path.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {_ID_REMEDY}") from error
    if not _WANDB_ID.fullmatch(text):
        raise UsageError(f"{path}: {text[:40]!r} is no id of a W&B run; {_ID_REMEDY}")
    return text
