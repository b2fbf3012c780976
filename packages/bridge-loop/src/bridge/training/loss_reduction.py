"""Reduces a step's metrics over microbatches and ranks, in one collective, to what was optimised.

Each metric declares how it is reduced. Over microbatches m and the contributing ranks r:

    token_mean    sum_mr value / sum_mr count         (train.loss_normalization=token)
                  mean over microbatches and data-parallel ranks of sum_c value / sum_c count,
                  c the context-parallel ranks        (train.loss_normalization=microbatch)
    mean          sum_mr value / number of values
    total         sum_mr value
    maximum       max_mr value
    local         mean over this rank's microbatches; a rank that reported none has that of the
                  first rank that did
    ratio         sum_mr value / sum_mr count, in either normalisation (the loop's own metrics)

Everything is added in float64, so that counts are exact beyond 2**24.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from bridge.training.metric_kinds import (
    Kind,
    Metric,
    MicrobatchRecord,
    as_metric,
    local,
    maximum,
    mean,
    snapshot,
    token_mean,
    total,
)
from bridge.training.usage_error import UsageError

__all__ = [
    "Metric",
    "MetricReducer",
    "MicrobatchRecord",
    "ReducedMetrics",
    "as_metric",
    "local",
    "maximum",
    "mean",
    "snapshot",
    "token_mean",
    "total",
]


@dataclass(frozen=True, slots=True)
class _Block:
    """Metrics of some microbatches, stacked. K keys, M microbatches."""

    keys: tuple[tuple[str, Kind], ...]
    values: torch.Tensor
    """float64 [2, K, M]: values and counts; where absent 0, or -inf for a maximum."""
    present: torch.Tensor
    """float64 [K, M] in host memory: 1 where the microbatch reported the key."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """This rank's part of a reduction, kept until the result is read."""

    blocks: list[_Block]
    alarm: torch.Tensor | None
    conflicts: set[str]
    patterns: set[str]
    microbatches: int
    counts: list[torch.Tensor]
    """Tokens of the microbatches that have a count, in sums."""


class MetricReducer:
    """Turns the records of a step, or of several, into numbers that are equal on every rank.

    All ranks of the group call `reduce`, those without a record too. One all-reduce carries the
    agreed keys (in ``microbatch`` normalisation with context parallelism another one, within the
    context-parallel group). When some rank reports a key that was not agreed, the result says so
    to all, and reading it exchanges the keys and reduces once more.
    """

    def __init__(
        self,
        *,
        normalization: Literal["token", "microbatch"],
        contributes: bool,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        context_parallel_size: int = 1,
        context_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Set up a reducer.

        Args:
            normalization: ``train.loss_normalization``.
            contributes: Whether this rank's records count: true on the last pipeline stage's
                ranks with tensor-parallel rank 0, of which no two hold the same tokens.
            device: Where the collective runs.
            group: The ranks that learn the result; the default group, or without
                torch.distributed this process alone, if None.
            context_parallel_size: Ranks that share a microbatch's sequences.
            context_parallel_group: Those ranks.
        """
        self._normalization = normalization
        self._contributes = contributes
        self._device = device
        self._group = group
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._size = dist.get_world_size(group) if dist.is_initialized() else 1
        self._cp_size = context_parallel_size
        self._cp_group = context_parallel_group
        self._agreed: dict[str, Kind] = {}
        self._blocks: list[_Block] = []
        self._conflicts: set[str] = set()
        self._patterns: set[str] = set()
        self._microbatches = 0
        self._counts: list[torch.Tensor] = []
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}
        self._zero = torch.zeros((), dtype=torch.float64, device=device)

    def fresh(self) -> "MetricReducer":
        """Return a reducer with nothing accumulated, for the same ranks and agreed keys.

        What is accumulated in it and never reduced, as of an evaluation that raised, is nobody
        else's. Keys that one of the two agrees on, the other knows.
        """
        reducer = copy.copy(self)
        reducer._start_afresh()
        return reducer

    def accumulate(self, records: Iterable[MicrobatchRecord]) -> None:
        """Add microbatches to the next reduction; no collective, no wait for the device."""
        records = list(records)
        kinds: dict[str, Kind] = {}
        for record in records:
            if self._contributes:
                self._patterns.add("(loss, ...)" if record.count is None else "(sum, count, ...)")
            for key, metric in record.metrics.items():
                if metric.kind != "local" and not self._contributes:
                    continue
                if kinds.setdefault(key, metric.kind) != metric.kind:
                    self._conflicts.add(f"{key!r} ({kinds[key]} and {metric.kind})")
        if kinds:
            self._blocks.append(self._stack([record.metrics for record in records], kinds))
        self.count(len(records))
        if self._contributes:
            counts = [record.count for record in records if record.count is not None]
            if counts:
                self._counts.append(torch.stack(counts).sum())

    def count(self, microbatches: int) -> None:
        """Count microbatches that have no metrics, such as those whose data was collected."""
        if self._contributes:
            self._microbatches += microbatches

    def reduce(
        self,
        records: Iterable[MicrobatchRecord] = (),
        *,
        alarm: torch.Tensor | None = None,
        of_all_ranks: Mapping[str, Metric] | None = None,
    ) -> "ReducedMetrics":
        """Reduce the records, and those accumulated before them, over the group; start afresh.

        Collective, but it does not wait for the device.

        Args:
            records: A step's records, one for each microbatch; what the schedule returned.
            alarm: `LossWatch.alarm` of this rank.
            of_all_ranks: Metrics to which every rank that has them contributes, also one whose
                records do not count; totals and ratios.
        """
        self.accumulate(records)
        if of_all_ranks:
            shared = {key: snapshot(m, self._device) for key, m in of_all_ranks.items()}
            self._blocks.append(
                self._stack([shared], {key: metric.kind for key, metric in shared.items()})
            )
        pending = _Pending(
            self._blocks, alarm, self._conflicts, self._patterns, self._microbatches, self._counts
        )
        self._start_afresh()
        return self._launch(pending)

    def _start_afresh(self) -> None:
        self._blocks, self._conflicts, self._patterns = [], set(), set()
        self._microbatches, self._counts = 0, []

    def _launch(self, pending: _Pending) -> "ReducedMetrics":
        layout = _Layout(dict(self._agreed), self._size, self._normalization)
        vector = self._pack(layout, pending)
        if self._size > 1:
            dist.all_reduce(vector, group=self._group)
        return ReducedMetrics(layout, vector, self._rank, lambda: self._agree_and_repeat(pending))

    def _agree_and_repeat(self, pending: _Pending) -> "ReducedMetrics":
        """Exchange the keys over the group, extend the agreed ones, and reduce once more."""
        mine = (
            [item for block in pending.blocks for item in block.keys],
            sorted(pending.conflicts),
            sorted(pending.patterns),
        )
        everyone: list[Any] = [mine]
        if self._size > 1:
            everyone = [None] * self._size
            dist.all_gather_object(everyone, mine, group=self._group)
        conflicts: set[str] = set()
        patterns: set[str] = set()
        for keys, own_conflicts, own_patterns in everyone:
            conflicts.update(own_conflicts)
            patterns.update(own_patterns)
            for key, kind in keys:
                if self._agreed.setdefault(key, kind) != kind:
                    conflicts.add(f"{key!r} ({self._agreed[key]} and {kind})")
        if conflicts:
            raise UsageError(
                "Metrics are declared with different reductions on different microbatches, steps "
                f"or ranks: {', '.join(sorted(conflicts))}. Declare each always the same way."
            )
        if len(patterns) > 1:
            raise UsageError(
                f"Loss functions return {' and '.join(sorted(patterns))} on different ranks. The "
                "two weigh microbatches differently: return always the same."
            )
        return self._launch(pending)

    def _stack(self, records: Sequence[Mapping[str, Metric]], kinds: dict[str, Kind]) -> _Block:
        """Stack K keys of M records' metrics with one kernel, Python numbers aside."""
        host = torch.zeros(2, len(kinds), len(records), dtype=torch.float64)
        present = torch.zeros(len(kinds), len(records), dtype=torch.float64)
        cells = [self._zero] * host.numel()
        flat_host = host.view(-1)
        for row, (key, kind) in enumerate(kinds.items()):
            if kind == "maximum":
                host[0, row] = -torch.inf
            for column, record in enumerate(records):
                metric = record.get(key)
                if metric is None:
                    continue
                present[row, column] = 1.0
                host[0, row, column] = 0.0
                place = row * len(records) + column
                for number in (metric.value, metric.count):
                    if isinstance(number, torch.Tensor):
                        cells[place] = number
                    else:
                        flat_host[place] = number
                    place += present.numel()
        values = torch.stack(cells).view_as(host)
        if host.any():
            values += _to_device(host, self._device)
        return _Block(tuple(kinds.items()), values, present)

    def _pack(self, layout: "_Layout", pending: _Pending) -> torch.Tensor:
        """Put this rank's sums in the agreed places of a vector of zeros."""
        host = torch.zeros(layout.length, dtype=torch.float64)
        known = all(layout.kinds.get(k) == kind for b in pending.blocks for k, kind in b.keys)
        host[layout.CHANGED] = float(not known or bool(pending.conflicts))
        host[layout.MICROBATCHES] = pending.microbatches
        host[layout.COUNTED] = float(bool(pending.counts))
        for first in layout.maxima.values():
            host[first + self._rank] = -torch.inf
        in_microbatches = self._normalization == "microbatch"
        for block in pending.blocks:
            for row, reports in enumerate(block.present.sum(dim=1).tolist()):
                key, kind = block.keys[row]
                place = layout.place(key, kind)
                if place is not None and not (in_microbatches and kind == "token_mean"):
                    host[place] += reports
                    if kind == "local":
                        host[layout.locals[key] + self._rank] += reports
        vector = _to_device(host, self._device)
        for block in pending.blocks:
            self._add_sums(layout, block, vector)
            self._add_maxima(layout, block, vector)
        if in_microbatches and self._contributes:
            self._add_ratios(layout, pending.blocks, vector)
        if pending.alarm is not None:
            vector[layout.ALARM] += pending.alarm
        if pending.counts:
            vector[layout.TOKENS] += torch.stack(pending.counts).sum()
        return vector

    def _add_sums(self, layout: "_Layout", block: _Block, vector: torch.Tensor) -> None:
        rows: list[int] = []
        places: list[int] = []
        for row, (key, kind) in enumerate(block.keys):
            place = layout.place(key, kind)
            by_ratio = kind == "token_mean" and self._normalization == "microbatch"
            if place is None or kind == "maximum" or by_ratio:
                continue
            if kind == "local":
                rows.append(row)
                places.append(layout.locals[key] + layout.size + self._rank)
                continue
            rows += [row, len(block.keys) + row]
            places += [place + 1, place + 2]
        if rows:
            sums = block.values.sum(dim=2).view(-1)
            vector.index_add_(0, self._index(places), sums.index_select(0, self._index(rows)))

    def _add_maxima(self, layout: "_Layout", block: _Block, vector: torch.Tensor) -> None:
        for row, (key, kind) in enumerate(block.keys):
            if kind == "maximum" and layout.place(key, kind) is not None:
                mine = vector[layout.maxima[key] + self._rank]
                torch.maximum(mine, block.values[0, row].amax(), out=mine)

    def _add_ratios(
        self, layout: "_Layout", blocks: Sequence[_Block], vector: torch.Tensor
    ) -> None:
        """Divide each microbatch's sums over the context-parallel ranks, then add the ratios."""
        keys = [key for key, kind in layout.kinds.items() if kind == "token_mean"]
        if not keys or not blocks:
            return
        parts = []
        for block in blocks:
            part = block.values.new_zeros(3, len(keys), block.values.shape[2])
            row_of = {
                key: row for row, (key, kind) in enumerate(block.keys) if kind == "token_mean"
            }
            to = [index for index, key in enumerate(keys) if key in row_of]
            if to:
                rows = self._index([row_of[keys[index]] for index in to])
                present = _to_device(block.present, self._device)
                stacked = torch.cat((block.values, present[None])).index_select(1, rows)
                part.index_add_(1, self._index(to), stacked)
            parts.append(part)
        sums, counts, present = together = torch.cat(parts, dim=2)
        if self._cp_size > 1:
            dist.all_reduce(together, group=self._cp_group)
        # As the objective has it: a microbatch without tokens is a loss of sum / 1.
        ratios = torch.where(counts == 0, sums, sums / counts)
        rows3 = ((present > 0).sum(dim=1), ratios.sum(dim=1), counts.sum(dim=1))
        places = [layout.places[key] + part for part in range(3) for key in keys]
        vector.index_add_(0, self._index(places), torch.cat([row.double() for row in rows3]))

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        key = tuple(numbers)
        if key not in self._indices:
            self._indices[key] = _to_device(torch.tensor(key, dtype=torch.int64), self._device)
        return self._indices[key]


class _Layout:
    """Places of the agreed keys in the vector that is all-reduced.

    ``[changed, alarm, microbatches, counted, tokens, (reports, sum, count) for each key, slots per
    rank]``. A maximum has one slot per rank and a local metric two, of all ranks' reports and then
    of their sums: each rank fills its own, so that they travel in a sum unchanged.
    """

    CHANGED = 0
    ALARM = 1
    MICROBATCHES = 2
    COUNTED = 3
    TOKENS = 4
    FIRST_KEY = 5

    def __init__(self, kinds: dict[str, Kind], size: int, normalization: str) -> None:
        self.kinds = kinds
        self.by_ratio = normalization == "microbatch"
        self.size = size
        self.places = {key: self.FIRST_KEY + 3 * index for index, key in enumerate(kinds)}
        self.maxima: dict[str, int] = {}
        self.locals: dict[str, int] = {}
        self.length = self.FIRST_KEY + 3 * len(kinds)
        for key, kind in kinds.items():
            if kind == "maximum":
                self.maxima[key] = self.length
                self.length += size
            elif kind == "local":
                self.locals[key] = self.length
                self.length += 2 * size

    def place(self, key: str, kind: Kind) -> int | None:
        """First slot of a key, None if it is not agreed with this kind."""
        return self.places[key] if self.kinds.get(key) == kind else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A reduction's result on the host."""

    values: dict[str, float | None]
    alarm: bool
    microbatches: int
    tokens: int | None


@dataclass(slots=True)
class ReducedMetrics:
    """A reduction's result, on the device until it is asked for."""

    _layout: _Layout
    _vector: torch.Tensor
    _rank: int
    _repeat: Callable[[], "ReducedMetrics"]
    _read: "_Read | None" = field(default=None, init=False)

    def to_dict(self) -> dict[str, float | None]:
        """Wait for the device and return each metric's value, equal on every rank.

        A collective if some rank reported a new key: call it on all ranks of the group or none.
        A token mean over no token is None. A key that nobody reported is left out. Only `local`
        ones differ: each rank that reported one has its own, the others that of the first.

        Raises:
            UsageError: A metric was declared with different reductions; on every rank.
        """
        return dict(self._resolve().values)

    @property
    def alarm(self) -> bool:
        """Whether some rank's loss was an anomaly, equal on every rank; waits, as `to_dict`."""
        return self._resolve().alarm

    @property
    def microbatches(self) -> int:
        """Records that were reduced, of all contributing ranks; waits, as `to_dict`.

        Context-parallel ranks share a microbatch and have a record each.
        """
        return self._resolve().microbatches

    @property
    def tokens(self) -> int | None:
        """Tokens in their losses; None if the loss functions count none. It waits, as `to_dict`."""
        return self._resolve().tokens

    def _resolve(self) -> "_Read":
        if self._read is None:
            numbers = self._vector.tolist()
            if numbers[_Layout.CHANGED]:
                self._read = self._repeat()._resolve()
            else:
                self._read = _Read(
                    values=self._values(numbers),
                    alarm=numbers[_Layout.ALARM] != 0,
                    microbatches=int(numbers[_Layout.MICROBATCHES]),
                    tokens=int(numbers[_Layout.TOKENS]) if numbers[_Layout.COUNTED] else None,
                )
        return self._read

    def _values(self, numbers: list[float]) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for key, place in self._layout.places.items():
            kind = self._layout.kinds[key]
            reports, value, count = numbers[place : place + 3]
            if not reports:
                continue
            if kind == "local":
                values[key] = self._own_or_first(numbers, self._layout.locals[key])
            elif kind == "token_mean":
                weight = reports if self._layout.by_ratio else count
                values[key] = value / weight if count else None
            elif kind == "ratio":
                values[key] = value / count if count else None
            elif kind == "mean":
                values[key] = value / reports
            elif kind == "total":
                values[key] = value
            else:
                first = self._layout.maxima[key]
                values[key] = _largest(numbers[first : first + self._layout.size])
        return values

    def _own_or_first(self, numbers: list[float], first: int) -> float:
        """Return the mean over this rank's reports of a local metric, else the first rank's."""
        size = self._layout.size
        reports, sums = numbers[first : first + size], numbers[first + size : first + 2 * size]
        reporter = self._rank
        if not reports[reporter]:
            reporter = next(rank for rank in range(size) if reports[rank])
        return sums[reporter] / reports[reporter]


def _largest(numbers: Sequence[float]) -> float:
    return float("nan") if any(n != n for n in numbers) else max(numbers)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy host memory to the device without waiting for it; a copy on the CPU too."""
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)
