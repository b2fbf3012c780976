"""Ctrl-C and SIGTERM: finish the step, save, say how to go on.

The first signal asks the loop to stop at the end of the step. A second Ctrl-C ends the process at
once; one that follows within half a second is the same one, passed on by a program in between
(`uv run` does so after a fifth of a second). The handlers that were there before come back when the
run ends, however it ends.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

SECONDS_OF_ONE_INTERRUPT = 0.5

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers the first signal that asked this rank to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interrupted_at: float | None = None

    def agreed(self, control_group: dist.ProcessGroup) -> signal.Signals | None:
        """Return the signal that any rank has received, the same on every rank.

        A collective of one number on the host, so it waits for no GPU. Every rank leaves the loop
        at the same step, whichever of them was told to.

        Args:
            control_group: All ranks, over gloo.
        """
        if control_group.size() == 1:
            return self.signal
        number = torch.tensor(0 if self.signal is None else int(self.signal), dtype=torch.int32)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=control_group)
        found = int(number.item())
        return signal.Signals(found) if found else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > SECONDS_OF_ONE_INTERRUPT:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the run lasts; in another thread than the main one, do not."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request._receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
