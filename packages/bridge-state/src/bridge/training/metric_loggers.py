"""Where metrics go: metrics.jsonl, TensorBoard and Weights & Biases, with one call a row.

Each backend gets the same names and values. A step may have several rows (its training metrics,
then its validation metrics) as long as no name repeats; a step never goes back. JSONL writes one
line a row; TensorBoard one point a name; W&B one row a row, with the step in its column "step".

The trackers are imported only by the class that needs them.
"""

import errno
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from bridge.training.durable_files import replace_durably
from bridge.training.usage_error import UsageError
from bridge.training.wandb_history import written_rows

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)

# W&B's own rule, and no U+FFFD, which stands for bytes that are no text.
_WANDB_ID = re.compile(r"[^/\\#?%:\x00-\x1f\x7f\ufffd]{1,128}")
_ID_REMEDY = (
    "write the id of the W&B run into it (it is in the names wandb/*run-*-ID), or remove it for a "
    "new W&B run"
)

NOT_FINITE = "not_finite"
"""The key in a row of metrics.jsonl of the values that JSON does not have."""


class MetricLogger(Protocol):
    """Takes one row of metrics at a time."""

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Write one row: the value of each name after optimizer step ``step``.

        None says that the step has no such value (a mean over no token, say).
        """
        ...

    def sync(self) -> None:
        """Return when the rows so far outlive this process."""
        ...

    def close(self) -> None:
        """Write out what is held back and release the files; a second call does nothing."""
        ...


class JsonlLogger:
    """One strict JSON object a line: ``{"step": 10, "lm loss": 2.5, ...}``.

    None is null, and so are NaN and infinities, which JSON does not have: a row that has some
    ends with ``"not_finite": {"lm loss": "nan"}`` (or "inf", "-inf"), and `as_logged` puts them
    back. Each row is flushed as a whole line. A file that ends in a torn line (its writer was
    killed) loses that line when it is opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path`` for appending, with its directory where that is missing."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        # Nothing is held back, so nothing is left for `close` where the disk is full.
        self._file = self.path.open("ab", buffering=0)

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Append one line.

        Raises:
            UsageError: A metric is called "step" or "not_finite".
            OSError: The line cannot be written, or the file was deleted.
        """
        if taken := {"step", NOT_FINITE} & metrics.keys():
            raise UsageError(f'a metric cannot be called "{taken.pop()}": the row has that key')
        row: dict[str, Any] = {"step": step, **metrics}
        not_finite = {
            name: str(float(value))
            for name, value in metrics.items()
            if value is not None and not math.isfinite(value)
        }
        if not_finite:
            row |= {**dict.fromkeys(not_finite), NOT_FINITE: not_finite}
        line = json.dumps(row, allow_nan=False, ensure_ascii=False)
        if self._is_deleted():
            raise FileNotFoundError(
                errno.ENOENT, "was deleted or replaced while the run goes on", str(self.path)
            )
        rest = memoryview((line + "\n").encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _is_deleted(self) -> bool:
        opened = os.fstat(self._file.fileno())
        if opened.st_nlink:
            return False
        # Some file systems tell no number of links.
        try:
            return not os.path.samestat(opened, self.path.stat())
        except FileNotFoundError:
            return True

    def sync(self) -> None:
        """Make the rows durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make the rows durable and close the file."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


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

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Add one point to each name's curve."""
        for name, value in metrics.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        # A row comes once in many steps, and whoever watches a curve wants its last point.
        self.writer.flush()

    def sync(self) -> None:
        """Do nothing: every row is flushed."""

    def close(self) -> None:
        """Write out the last points and close the event file."""
        if not self._closed:
            self._closed = True
            self.writer.close()


class WandbLogger:
    """Rows of one Weights & Biases run, which a resumed run continues under the same id.

    The id stands in ``run_dir/wandb/run_id``. ``WANDB_MODE=offline`` works, also on resume; each
    start has its own folder under ``run_dir/wandb``. A row is committed when it is logged, so a run
    that is killed keeps it. Rows of steps that a resumed run repeats are in W&B already and are not
    written twice. The axis of all curves is the column "step"; W&B's own ``_step`` counts rows.
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
                # The process that writes the files holds back 15 seconds of rows by default, and
                # ends without writing them when this one is killed.
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
            # The answer comes when what was sent before has been taken up.
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


class MetricLoggers:
    """Hands each row to every logger; without loggers (ranks that do not log) it only checks."""

    def __init__(self, loggers: Sequence[MetricLogger] = ()) -> None:
        """Fan out to ``loggers``, in their order."""
        self.loggers = tuple(loggers)
        self._step: int | None = None
        self._names: set[str] = set()

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Write one row everywhere.

        Raises:
            UsageError: The step is lower than the last one, or a name was already written for it.
        """
        if self._step is not None and step < self._step:
            raise UsageError(f"metrics of step {step} come after those of step {self._step}")
        if step != self._step:
            self._step, self._names = step, set()
        if repeated := sorted(self._names & metrics.keys()):
            raise UsageError(
                f"step {step} already has a value for {', '.join(map(repr, repeated))}: "
                "log each name once a step"
            )
        self._names |= metrics.keys()
        for logger in self.loggers:
            logger.log(metrics, step)

    def sync(self) -> None:
        """Return when every logger's rows outlive this process."""
        for logger in self.loggers:
            logger.sync()

    def close(self) -> None:
        """Close every logger, also if one of them fails."""
        with ExitStack() as stack:
            for logger in reversed(self.loggers):
                stack.callback(logger.close)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close every logger."""
        self.close()


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


def as_logged(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl with its NaN and infinities, as it was logged."""
    not_finite = row.get(NOT_FINITE, {})
    return {
        name: float(not_finite[name]) if name in not_finite else value
        for name, value in row.items()
        if name != NOT_FINITE
    }


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without a torn last line; none if there is no file.

    Raises:
        UsageError: The file cannot be read, or a line other than the last one is no row.
    """
    lines = _read_lines(Path(path))
    found = [_row(Path(path), lines, number) for number in range(len(lines))]
    return [row for row in found if row is not None]


def truncate_jsonl(path: str | os.PathLike[str], after_step: int) -> int:
    """Remove the rows of steps after ``after_step`` and a torn last line; return how many went.

    A run that resumes from the checkpoint of ``after_step`` writes those steps again; -1 empties
    the file. The file is replaced atomically, or left alone when nothing is to be removed.

    Raises:
        UsageError: The file cannot be read, or a line other than the last one is no row.
    """
    path = Path(path)
    lines = _read_lines(path)
    found = [_row(path, lines, number) for number in range(len(lines))]
    kept = [
        line
        for line, row in zip(lines, found, strict=True)
        if row is not None and row["step"] <= after_step
    ]
    if len(kept) < len(lines):
        replace_durably(path, b"".join(kept))
    return len(lines) - len(kept)


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); repair or move the file"
        ) from error


def _row(path: Path, lines: list[bytes], number: int) -> dict[str, Any] | None:
    """Return the row of a line, None for a torn last line."""
    last = number == len(lines) - 1
    if last and not lines[number].endswith(b"\n"):
        return None
    try:
        row: dict[str, Any] = json.loads(lines[number])
        if not isinstance(row["step"], int):
            raise TypeError('its "step" is no number')
    except (ValueError, KeyError, TypeError) as error:
        if last:  # After a power failure a torn line may be filled with zeros.
            return None
        raise UsageError(
            f"{path}, line {number + 1} is not a row of metrics: {error}; repair or move the file"
        ) from error
    return row


def _drop_torn_line(path: Path) -> None:
    """Cut off what stands after the last newline."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s: dropped a torn last line of %d bytes", path, len(content) - whole)
        os.truncate(path, whole)
