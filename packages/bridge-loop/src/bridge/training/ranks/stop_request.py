"""Requests to stop a run, from signals and its time limit.

Ctrl-C (SIGINT), SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (which schedulers send some time
before the end) are equal requests: the loop finishes the step, saves and ends. SIGHUP stays ignored
where it is ignored, as under ``nohup``.

A second Ctrl-C ends the process at once. One that follows within half a second is the same one,
passed on by a program in between (`uv run` does so after a fifth of a second). The previous
handlers are restored when the run ends, however it ends.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Literal, cast

import torch.distributed as dist

from bridge.training.ranks.collectives import largest_of_all

type StopCause = Literal["time limit", "SIGUSR1", "SIGHUP", "SIGINT", "SIGTERM"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

SECONDS_OF_ONE_INTERRUPT = 0.5

# Ranks exchange the index of their cause. Where they have several the last of these counts.
_ORDER: tuple[StopCause, ...] = ("time limit", "SIGUSR1", "SIGHUP", "SIGINT", "SIGTERM")
_CAUSES = (None, *_ORDER)


class StopRequest:
    """The first signal to this rank or the end of its time limit, as a request to stop.

    Args:
        ends_at: End of the time limit, on the clock of `time.monotonic`; None for no limit.
    """

    def __init__(self, ends_at: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.cause: StopCause | None = None
        """The cause that all ranks have agreed on; None while the run goes on."""
        self.agreed_at = time.monotonic()
        """Time of the last agreement of all ranks, on the clock of `time.monotonic`."""
        self._ends_at = ends_at
        self._interrupted_at: float | None = None

    @property
    def is_pending(self) -> bool:
        """Whether this rank has a cause to stop, which other ranks may not know yet."""
        return self._own_cause() is not None

    def agree(self, control_group: dist.ProcessGroup) -> StopCause | None:
        """Return the cause of any rank to stop, the same on every rank, and keep it as `cause`.

        A collective of one number on the host, without a host-device sync. All ranks leave the loop
        at the same step.

        Args:
            control_group: All ranks, over gloo.
        """
        if self.cause is None:
            mine = _CAUSES.index(self._own_cause())
            self.cause = _CAUSES[largest_of_all(mine, control_group)]
            self.agreed_at = time.monotonic()
        return self.cause

    def _own_cause(self) -> StopCause | None:
        if self.signal is not None:
            return cast(StopCause, self.signal.name)
        is_over = self._ends_at is not None and time.monotonic() >= self._ends_at
        return "time limit" if is_over else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > SECONDS_OF_ONE_INTERRUPT:
            raise KeyboardInterrupt


def signals_to_catch() -> list[signal.Signals]:
    """Return `STOP_SIGNALS`, without SIGHUP where it is ignored, as under ``nohup``."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored]


@contextlib.contextmanager
def stop_signals(ends_at: float | None = None) -> Iterator[StopRequest]:
    """Catch `STOP_SIGNALS` during the run; outside the main thread, catch none.

    Args:
        ends_at: As for `StopRequest`.
    """
    request = StopRequest(ends_at)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request._receive) for number in signals_to_catch()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
