"""metrics.jsonl: a record a line, written as it is logged, read and cut off on resume."""

import errno
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bridge.training.durable_files import replace_durably
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer

log = logging.getLogger(__name__)

_NOT_FINITE = "not_finite"
"""The key in a record of metrics.jsonl of the values that JSON does not have."""


class JsonlLogger:
    """One strict JSON object a line: ``{"step": 10, "lm loss": 2.5, ...}``.

    None is null, and so are NaN and infinities, which JSON does not have: a record that has some
    ends with ``"not_finite": {"lm loss": "nan"}`` (or "inf", "-inf"), and `read_records` restores
    them. Each record is flushed as one line. A file that ends in a torn line (its writer was
    killed) loses that line when it is opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path`` for appending, with its directory where that is missing."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        # Unbuffered, so that `close` has nothing left to write where the disk is full.
        self._file = self.path.open("ab", buffering=0)

    @classmethod
    def of_run(cls, config: "ConfigContainer", run_dir: Path, first_step: int) -> Self:
        """Open the metrics.jsonl of a run; see `open_metric_loggers`."""
        path = run_dir / "metrics.jsonl"
        if config.checkpoint.resume:
            truncate_jsonl(path, first_step - 1)
        return cls(path)

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Append one line.

        Raises:
            UsageError: A metric is called "step" or "not_finite".
            OSError: The line cannot be written, or the file was deleted.
        """
        if taken := {"step", _NOT_FINITE} & metrics.keys():
            raise UsageError(f'a metric cannot be called "{taken.pop()}": the record has that key')
        record: dict[str, Any] = {"step": step, **metrics}
        not_finite = {
            name: str(float(value))
            for name, value in metrics.items()
            if value is not None and not math.isfinite(value)
        }
        if not_finite:
            record |= {**dict.fromkeys(not_finite), _NOT_FINITE: not_finite}
        line = json.dumps(record, allow_nan=False, ensure_ascii=False)
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
        # Some file systems report no number of links.
        try:
            return not os.path.samestat(opened, self.path.stat())
        except FileNotFoundError:
            return True

    def sync(self) -> None:
        """Make the records durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make the records durable and close the file."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl as they were logged; none if there is no file.

    A torn last line is skipped.

    Raises:
        UsageError: The file cannot be read, or a line other than the last one is no record.
    """
    lines = _read_lines(Path(path))
    found = [_parse_line(Path(path), lines, number) for number in range(len(lines))]
    return [_with_not_finite(record) for record in found if record is not None]


def truncate_jsonl(path: str | os.PathLike[str], after_step: int) -> int:
    """Remove a torn last line and the records after ``after_step``; return how many were removed.

    A run that resumes from the checkpoint of ``after_step`` writes those steps again; -1 empties
    the file. The file is replaced atomically, or left alone when nothing is to be removed.

    Raises:
        UsageError: The file cannot be read, or a line other than the last one is no record.
    """
    path = Path(path)
    lines = _read_lines(path)
    found = [_parse_line(path, lines, number) for number in range(len(lines))]
    kept = [
        line
        for line, record in zip(lines, found, strict=True)
        if record is not None and record["step"] <= after_step
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


def _parse_line(path: Path, lines: list[bytes], number: int) -> dict[str, Any] | None:
    """Return the record of a line, None for a torn last line."""
    last = number == len(lines) - 1
    if last and not lines[number].endswith(b"\n"):
        return None
    try:
        record: dict[str, Any] = json.loads(lines[number])
        if not isinstance(record["step"], int):
            raise TypeError('its "step" is no number')
    except (ValueError, KeyError, TypeError) as error:
        if last:  # After a power failure a torn line may be filled with zeros.
            return None
        raise UsageError(
            f"{path}, line {number + 1} is not a record of metrics: {error}; repair or move the "
            "file"
        ) from error
    return record


def _with_not_finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its NaN and infinities in place of nulls."""
    not_finite = record.pop(_NOT_FINITE, {})
    return record | {name: float(value) for name, value in not_finite.items()}


def _drop_torn_line(path: Path) -> None:
    """Remove the bytes after the last newline."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s: dropped a torn last line of %d bytes", path, len(content) - whole)
        os.truncate(path, whole)
