"""The interface of a metric logger, and the one that hands each record to several."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

from bridge.training.usage_error import UsageError


class MetricLogger(Protocol):
    """Takes one record of metrics at a time."""

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Write one record: the value of each name after optimizer step ``step``.

        None says that the step has no such value (a mean over no token, say).
        """

    def sync(self) -> None:
        """Return when the records so far survive the end of this process."""

    def close(self) -> None:
        """Write out buffered records and release the files; a second call does nothing."""


class MetricLoggers:
    """Hands each record to every logger; without loggers (ranks that do not log) it only checks."""

    def __init__(self, loggers: Sequence[MetricLogger] = ()) -> None:
        """Hand records to ``loggers``, in their order."""
        self.loggers = tuple(loggers)
        self._step: int | None = None
        self._names: set[str] = set()

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Write one record everywhere.

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

    def find[Kind: MetricLogger](self, kind: type[Kind]) -> Kind | None:
        """Return the logger of a kind, None if there is none."""
        return next((logger for logger in self.loggers if isinstance(logger, kind)), None)

    def sync(self) -> None:
        """Return when every logger's records survive the end of this process."""
        for logger in self.loggers:
            logger.sync()

    def close(self) -> None:
        """Close every logger, also if one of them fails."""
        with ExitStack() as stack:
            for logger in reversed(self.loggers):
                stack.callback(logger.close)
