"""Progress of a run, for its user: a live line on a terminal, plain lines anywhere else."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TextIO

type Record = Mapping[str, float | None]

# The format of each value that the loop itself logs, in the order on the terminal.
_SHOWN: dict[str, Callable[[float], str]] = {
    "learning_rate": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad norm {value:.3g}",
    "loss_scale": lambda value: f"loss scale {value:.0f}",
    "tokens_per_s": lambda value: f"{_short(value)} tokens/s",
    "mfu": lambda value: f"mfu {100 * value:.3g}%",
    "memory_gb": lambda value: f"{value:.1f} GB",
}
_NOT_SHOWN = {
    "step",
    "consumed_samples",
    "consumed_tokens",
    "skipped_steps",
    "step_time_s",
    "samples_per_s",
    *_SHOWN,
}
_REDRAW_SECONDS = 0.1


class Progress:
    """Writes the run's progress; `close` ends the live line before other output."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        is_terminal: bool | None = None,
        enabled: bool = True,
    ) -> None:
        """Write to `stream`.

        Args:
            stream: Standard output if None.
            is_terminal: Whether lines may be overwritten; detected if None.
            enabled: False on the ranks that write nothing for the user.
        """
        self._stream = stream or sys.stdout
        if is_terminal is None:
            is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._is_terminal = is_terminal
        self._enabled = enabled
        self._live = False
        """Whether the cursor is in a line that will be overwritten."""
        self._last_draw = float("-inf")
        self._details = ""
        self._step_seconds: float | None = None

    def note(self, line: str) -> None:
        """Write one line that stays."""
        if self._enabled:
            self._write(("\r\x1b[K" if self._live else "") + line + "\n")
            self._live = False

    def warn(self, warnings: Iterable[str]) -> None:
        """Write a line that stays for each warning."""
        for warning in warnings:
            self.note(f"warning: {warning}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show that a phase of the set-up begins, and at its end how long it took."""
        start = time.monotonic()
        self._show(f"{name} ...")
        try:
            yield
        except BaseException:
            self.note(f"{name:<16} failed after {time.monotonic() - start:.1f} s")
            raise
        self.note(f"{name:<16} {time.monotonic() - start:6.1f} s")

    def step(self, step: int, total_steps: int, record: Record) -> None:
        """Show a logged step with its record."""
        seconds = record.get("step_time_s")
        if seconds is not None:
            # Recent steps predict the next ones better than the first, slow ones.
            last = seconds if self._step_seconds is None else self._step_seconds
            self._step_seconds = 0.5 * (seconds + last)
        metrics = [name for name in record if name not in _NOT_SHOWN and not _is_rate(name)]
        if self._is_terminal:  # There is room for one.
            metrics = [name for name in metrics if name == "lm loss"] or metrics[:1]
        parts = [_named(name, record[name]) for name in metrics]
        for name, show in _SHOWN.items():
            value = record.get(name)
            if value is not None:
                parts.append(show(value))
            if name == "tokens_per_s":
                parts += [_rate(name, record[name]) for name in record if _is_rate(name)]
        if skipped := record.get("skipped_steps"):
            parts.append(f"{skipped:.0f} skipped")
        self._details = " | ".join(parts)
        self._show(self._step_line(step, total_steps))

    def tick(self, step: int, total_steps: int) -> None:
        """Show the number of a step that is not logged, on a terminal."""
        if self._is_terminal and time.monotonic() - self._last_draw > _REDRAW_SECONDS:
            self._draw(self._step_line(step, total_steps))

    def evaluation(self, name: str, step: int, metrics: Record) -> None:
        """Show the result of an evaluation."""
        results = " | ".join(_named(key, value) for key, value in metrics.items())
        self.note(f"{name} at step {step} | {results}")

    def summary(self, lines: Iterable[str]) -> None:
        """Write the last lines of the run."""
        self.close()
        self.note("")
        for line in lines:
            self.note(line)

    def close(self) -> None:
        """End the live line."""
        if self._live:
            self._write("\n")
            self._live = False

    def _step_line(self, step: int, total_steps: int) -> str:
        parts = [f"step {step}/{total_steps}"]
        if self._details:
            parts.append(self._details)
        if self._step_seconds is not None and step < total_steps:
            parts.append(f"eta {_duration((total_steps - step) * self._step_seconds)}")
        return " | ".join(parts)

    def _show(self, line: str) -> None:
        """Write a line: over the live one on a terminal, to stay anywhere else."""
        if self._is_terminal:
            self._draw(line)
        else:
            self.note(line)

    def _draw(self, line: str) -> None:
        """Write a line over the live one, cut to the width of the terminal."""
        if self._enabled:
            self._last_draw = time.monotonic()
            self._write("\r" + line[: self._width() - 1] + "\x1b[K")
            self._live = True

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            # The reader has ended, as `tee` does on the Ctrl-C that asks the run to stop and save;
            # or the terminal, whose SIGHUP does the same.
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._enabled = False

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:  # A stream that imitates a terminal has no size.
            return 80


def _is_rate(name: str) -> bool:
    """Whether a value is the rate of something other than tokens and samples, such as images."""
    return name.endswith("_per_s") and name not in _NOT_SHOWN


def _rate(name: str, value: float | None) -> str:
    return f"{_short(value or 0.0)} {name.removesuffix('_per_s')}/s"


def _named(name: str, value: float | None) -> str:
    if value is None:
        return f"{name} none"
    if isinstance(value, int):
        return f"{name} {value}"
    plain = value == 0 or 1e-3 <= abs(value) < 1e6
    return f"{name} {value:.4f}" if plain else f"{name} {value:.3e}"


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
