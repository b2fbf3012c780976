"""CUDA streams and events on a CPU, where all work is done immediately."""

import time
from typing import Any

import torch

CPU = torch.device("cpu")


class Stream:
    """The stream of a CPU, on which all work is done immediately."""

    device = CPU
    cuda_stream = 0
    priority = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        """Do nothing: everything before this call is done."""

    def wait_event(self, event: "Event") -> None:
        """Do nothing: everything before this call is done."""

    def synchronize(self) -> None:
        """Do nothing: everything before this call is done."""

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record `event`, or a new one, here."""
        event = event or Event()
        event.record(self)
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the lowest and the highest priority."""
        return 0, 0


class Event:
    """A point in time of a `Stream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Record the time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Do nothing: everything before the event is done."""

    def synchronize(self) -> None:
        """Do nothing: everything before the event is done."""

    def query(self) -> bool:
        """Whether the event was reached."""
        return True

    def elapsed_time(self, end_event: "Event") -> float:
        """Return the milliseconds from this event to `end_event`."""
        return (end_event._seconds - self._seconds) * 1000.0
