"""Run a training process under a time limit and read its speed out of what it wrote."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

THEIR_STEP = re.compile(
    r"iteration\s+(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+)"
    r"(?:.*throughput per GPU \(TFLOP/s/GPU\): ([\d.]+))?(?:.*lm loss: ([-+.\deE]+|nan))?"
)


@dataclass(frozen=True)
class Window:
    """The steps from one logged step to the next."""

    first: int
    """The step before the window's first."""
    last: int
    step_s: float
    """Mean seconds per step."""


@dataclass(kw_only=True)
class Process:
    """A finished process: its output, line by line with seconds since its start."""

    lines: list[tuple[float, str]]
    seconds: float
    error: str | None
    first_written_s: float | None
    """Seconds until the watched file had its first line."""

    def tail(self, count: int = 25) -> str:
        """Return its last lines."""
        return "".join(f"    | {line}" for _, line in self.lines[-count:])


@dataclass(kw_only=True)
class Measured:
    """The measurements of one run of one side."""

    side: str
    windows: list[Window] = field(default_factory=list)
    ms_per_step: float | None = None
    tokens_per_s: float | None = None
    peak_memory_gib: float | None = None
    first_step_s: float | None = None
    """From the start of the process to the end of the first step."""
    last_loss: float | None = None
    flops_per_step: float | None = None
    """By megatron.training's own formula."""
    seconds: float = 0.0
    error: str | None = None


def run_process(
    command: Sequence[str],
    environment: dict[str, str],
    *,
    log: Path,
    limit_s: float,
    watch: Path | None = None,
) -> Process:
    """Run a command, its output into `log`; after `limit_s` seconds its whole group is killed."""
    start = time.monotonic()
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    overdue = threading.Event()

    def kill() -> None:
        overdue.set()
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(child.pid, signal.SIGKILL)

    first_written: list[float] = []

    def look() -> None:
        while watch is not None and child.poll() is None and not first_written:
            if watch.exists() and watch.stat().st_size > 0:
                first_written.append(time.monotonic() - start)
            time.sleep(0.02)

    timer = threading.Timer(limit_s, kill)
    watcher = threading.Thread(target=look, daemon=True)
    timer.start()
    watcher.start()
    lines = []
    with child, log.open("w") as record:
        for line in child.stdout or ():
            lines.append((time.monotonic() - start, line))
            record.write(line)
    timer.cancel()
    watcher.join()
    error = None
    if overdue.is_set():
        error = f"killed after the limit of {limit_s:.0f} s"
    elif child.returncode != 0:
        error = f"exit code {child.returncode}"
    return Process(
        lines=lines,
        seconds=time.monotonic() - start,
        error=error,
        first_written_s=first_written[0] if first_written else None,
    )


def steady_step_s(windows: Sequence[Window], warmup: int) -> float | None:
    """Mean seconds per step over the windows that begin after `warmup` steps, None without any."""
    steady = [window for window in windows if window.first >= warmup]
    steps = sum(window.last - window.first for window in steady)
    if steps == 0:
        return None
    return sum((window.last - window.first) * window.step_s for window in steady) / steps


def first_step_s(first_logged_s: float, step: int, step_s: float | None) -> float:
    """Date the end of step 1 from the moment the first logged step was seen.

    Steps between them are taken at the steady speed, so warming-up after step 1 counts too.
    """
    return first_logged_s - (step - 1) * (step_s or 0.0)


def read_theirs(process: Process) -> Measured:
    """Read megatron.training's log."""
    measured = Measured(side="theirs", seconds=process.seconds, error=process.error)
    previous = 0
    for moment, line in process.lines:
        if line.startswith("rival "):
            measured.peak_memory_gib = json.loads(line.removeprefix("rival "))["peak_memory_gib"]
        found = THEIR_STEP.search(line)
        if found is None:
            continue
        step, milliseconds = int(found[1]), float(found[2])
        if measured.first_step_s is None:
            measured.first_step_s = first_step_s(moment, step, milliseconds / 1000)
        # Iteration 1 is logged for its own sake: the next line's mean still includes it.
        if step > 1:
            measured.windows.append(Window(previous, step, milliseconds / 1000))
            previous = step
        if found[3]:
            measured.flops_per_step = float(found[3]) * 1e9 * milliseconds
        if found[4]:
            measured.last_loss = float(found[4])
    return measured


def read_ours(process: Process, metrics: Path) -> Measured:
    """Read our metrics.jsonl."""
    measured = Measured(side="ours", seconds=process.seconds, error=process.error)
    if not metrics.exists():
        measured.error = measured.error or f"no {metrics.name}"
        return measured
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if "step_time_s" in row]
    previous = 0
    for row in rows:
        measured.windows.append(Window(previous, row["step"], row["step_time_s"]))
        previous = row["step"]
        measured.last_loss = row.get("lm loss", measured.last_loss)
    memory = [row["memory_gb"] * 1e9 / 2**30 for row in rows if "memory_gb" in row]
    measured.peak_memory_gib = max(memory) if memory else None
    if rows and process.first_written_s is not None:
        steady = steady_step_s(measured.windows, measured.windows[0].last)
        measured.first_step_s = first_step_s(process.first_written_s, rows[0]["step"], steady)
    return measured
