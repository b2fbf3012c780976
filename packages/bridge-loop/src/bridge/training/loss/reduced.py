"""The result of a reduction, read from the all-reduced vector."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bridge.training.loss.vector import VectorLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbers:
    """The result of a reduction, on the host."""

    values: dict[str, float | None]
    has_anomaly: bool
    microbatches: int
    samples: int
    tokens: int | None


@dataclass(slots=True)
class ReducedMetrics:
    """The result of a reduction, on the device until it is read."""

    _layout: VectorLayout
    _vector: torch.Tensor
    _rank: int
    _repeat: Callable[[], "ReducedMetrics"]
    _read: _Numbers | None = field(default=None, init=False)

    def to_dict(self) -> dict[str, float | None]:
        """Return each metric's value, equal on every rank; a host-device sync.

        A collective if some rank reported a new key: call it on all ranks of the group or none.
        A token mean over no token is None. A value is NaN if some rank reported NaN. A key that no
        rank reported is absent. Only `local` metrics differ between ranks: each rank that reported
        one has its own, the others have that of the first such rank.

        Raises:
            UsageError: A metric was declared with different reductions; on every rank.
        """
        return dict(self._resolve().values)

    @property
    def has_anomaly(self) -> bool:
        """Whether some rank's loss was an anomaly, equal on every rank; a host-device sync."""
        return self._resolve().has_anomaly

    @property
    def microbatches(self) -> int:
        """Number of reduced records, over all contributing ranks; a host-device sync.

        Context-parallel ranks share a microbatch and have a record each.
        """
        return self._resolve().microbatches

    @property
    def samples(self) -> int:
        """Sum of the records' weights (`MetricReducer.accumulate`); a host-device sync."""
        return self._resolve().samples

    @property
    def tokens(self) -> int | None:
        """Tokens in the records' losses, None if none has a count; a host-device sync."""
        return self._resolve().tokens

    @property
    def token_count(self) -> torch.Tensor:
        """The number of ranks that count tokens and their tokens, on the device."""
        return self._vector[VectorLayout.COUNTED : VectorLayout.TOKENS + 1]

    def _resolve(self) -> _Numbers:
        if self._read is None:
            vector = self._vector.cpu()
            header = vector[: VectorLayout.FIRST_KEY].tolist()
            if header[VectorLayout.CHANGED]:
                self._read = self._repeat()._resolve()
            else:
                counted, tokens = header[VectorLayout.COUNTED], header[VectorLayout.TOKENS]
                self._read = _Numbers(
                    values=self._values(vector),
                    has_anomaly=header[VectorLayout.ANOMALY] != 0,
                    microbatches=int(header[VectorLayout.MICROBATCHES]),
                    samples=int(header[VectorLayout.SAMPLES]),
                    tokens=int(tokens) if counted else None,
                )
        return self._read

    def _values(self, vector: torch.Tensor) -> dict[str, float | None]:
        layout, values = self._layout, dict[str, float | None]()
        cells = layout.cells(vector)
        for index, (key, kind) in enumerate(layout.kinds.items()):
            reports, value, count = cells[:, index].unbind(dim=1)
            if not reports.any():
                continue
            if kind == "local":
                first = layout.locals[key]
                values[key] = self._own_or_first(vector[first : first + 2 * layout.size].tolist())
            elif kind == "maximum":
                first = layout.maxima[key]
                values[key] = _largest(vector[first : first + layout.size].tolist())
            elif kind == "total":
                values[key] = float(value.sum())
            elif kind == "mean":
                values[key] = _mean_over_steps(value, reports, reports)
            elif kind == "ratio":
                values[key] = _mean_over_steps(value, count, count)
            else:
                weight = reports if self._layout.by_ratio else count
                values[key] = _mean_over_steps(value, weight, count)
        return values

    def _own_or_first(self, numbers: list[float]) -> float:
        """Return the mean over this rank's reports of a local metric, or over the first rank's."""
        size = self._layout.size
        reports, sums = numbers[:size], numbers[size:]
        reporter = self._rank
        if not reports[reporter]:
            reporter = next(rank for rank in range(size) if reports[rank])
        return sums[reporter] / reports[reporter]


def _mean_over_steps(
    values: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor
) -> float | None:
    """Return the mean of value / weight over the steps whose count is not 0; None without one."""
    counted = counts != 0
    if not counted.any():
        return None
    return float((values[counted] / weights[counted]).mean())


def _largest(numbers: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)
