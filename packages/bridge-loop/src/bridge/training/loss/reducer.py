"""Reduces metrics over microbatches, ranks and steps, in one collective.

Each metric declares how it is reduced. The value v_s of a step s over its microbatches m and the
contributing ranks r is

    token_mean    sum_mr value / sum_mr count         (train.loss_normalization=token)
                  mean over microbatches and data-parallel ranks of sum_c value / sum_c count,
                  c the context-parallel ranks        (train.loss_normalization=microbatch)
    mean          sum_mr value / number of values
    total         sum_mr value
    maximum       max_mr value
    ratio         sum_mr value / sum_mr count, in either normalization (the loop's own metrics)
    local         mean over this rank's microbatches; a rank that reported none has that of the
                  first rank that did

so a token mean is the loss that was optimized in that step. Over the S steps of an interval
(logger.average=interval) the value is

    token_mean, mean, ratio    sum_s v_s / S    over the S steps that have a value
    total                      sum_s v_s
    maximum                    max_s v_s
    local                      mean over this rank's microbatches of all S steps

which for a loss is what Megatron-LM logs: the mean of the steps' losses, each step with the same
weight however many tokens it has. Skipped steps are left out, unless all of them were skipped.
An evaluation is reduced as one step, whatever its number of batches.

Everything is added in float64, so that counts are exact beyond 2**24.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist

from bridge.training.loss.interval import FOLD_AT, Block, Group, Steps
from bridge.training.loss.metrics import (
    Kind,
    Metric,
    MicrobatchRecord,
    snapshot,
)
from bridge.training.ranks.collectives import from_every_rank
from bridge.training.usage_error import UsageError


@dataclass(frozen=True, slots=True)
class _Pending:
    """This rank's part of a reduction, kept until the result is read."""

    steps: Steps
    alarm: torch.Tensor | None
    conflicts: set[str]
    patterns: set[str]
    microbatches: int
    samples: int
    counts: list[torch.Tensor]
    """Tokens of the microbatches that have a count, in sums."""


class MetricReducer:
    """Turns the records of a step, or of several, into numbers that are equal on every rank.

    All ranks of the group call the same methods, those without a record too. A program's loop calls
    `add_step` after each step and `reduce` where it logs; an evaluation calls `accumulate` for each
    batch, which all belong to one step, and then `reduce`. One all-reduce carries all steps of the
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
        average: Literal["interval", "step"] = "interval",
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
            average: ``logger.average``: over all steps that were added since the last reduction,
                or over the newest alone.
        """
        self.average = average
        self._normalization = normalization
        self._contributes = contributes
        self._device = device
        self._group = group
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._size = dist.get_world_size(group) if dist.is_initialized() else 1
        self._cp_size = context_parallel_size
        self._cp_group = context_parallel_group
        self._agreed: dict[str, Kind] = {}
        # The current step's blocks and weights of microbatches, then whole steps.
        self._open: list[Block] = []
        self._open_weights: list[int] = []
        self._is_open = False
        self._taken, self._skipped = Steps(), Steps()
        self._conflicts: set[str] = set()
        self._patterns: set[str] = set()
        self._microbatches = self._samples = 0
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

    def accumulate(
        self, records: Iterable[MicrobatchRecord], *, weight: int = 1, copies: int = 1
    ) -> None:
        """Add microbatches to the current step; no collective, no host-device sync.

        Args:
            records: What the microbatches reported.
            weight: That of each of them in a mean over microbatches; its samples, where
                microbatches have several sizes.
            copies: How often each sample stands in its microbatch: what sums are divided by.
        """
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
            block = self._stack([record.metrics for record in records], kinds)
            block = self._weighted(block, weight, copies)
            self._open.append(replace(block, column=len(self._open_weights)))
        self._open_weights += [weight] * len(records)
        self._is_open = True
        self.count(len(records), weight=weight)
        if self._contributes:
            counts = [record.count for record in records if record.count is not None]
            if counts and copies > 1:
                counts = [torch.stack(counts).sum() // copies]
            self._counts += counts
            if len(self._counts) >= FOLD_AT:
                self._counts = [torch.stack(self._counts).sum()]

    def count(self, microbatches: int, *, weight: int = 1) -> None:
        """Count microbatches that have no metrics, such as those whose data was collected."""
        if self._contributes:
            self._microbatches += microbatches
            self._samples += microbatches * weight

    def add_step(
        self,
        records: Iterable[MicrobatchRecord],
        *,
        of_all_ranks: Mapping[str, Metric] | None = None,
        is_skipped: bool = False,
    ) -> None:
        """Add a whole training step to the next reduction; no collective, no host-device sync.

        Args:
            records: The step's records, one for each microbatch; what the schedule returned.
            of_all_ranks: As `reduce` takes it.
            is_skipped: Whether the step was left out, which must be the same on every rank. It is
                left out of the average too, but for the tokens and microbatches.
        """
        self.accumulate(records)
        self._accumulate_of_all_ranks(of_all_ranks or {})
        if self.average == "step":
            self._taken, self._skipped = Steps(), Steps()
        self._close_step(self._skipped if is_skipped else self._taken)

    def reduce(
        self,
        records: Iterable[MicrobatchRecord] | None = None,
        *,
        alarm: torch.Tensor | None = None,
        of_all_ranks: Mapping[str, Metric] | None = None,
    ) -> "ReducedMetrics":
        """Reduce what was added since the last reduction over the group, and start afresh.

        Collective, but it does not wait for the device.

        Args:
            records: More records of the current step, the last one; of a step of their own after
                `add_step`. None where there are none on any rank.
            alarm: `LossWatch.alarm` of this rank.
            of_all_ranks: Metrics of that step to which every rank that has them contributes, also
                one whose records do not count; totals and ratios.
        """
        if records is not None:
            self.accumulate(records)
        self._accumulate_of_all_ranks(of_all_ranks or {})
        if self._is_open or not (self._taken.number or self._skipped.number):
            self._close_step(self._taken)
        pending = _Pending(
            self._taken if self._taken.number else self._skipped,
            alarm,
            self._conflicts,
            self._patterns,
            self._microbatches,
            self._samples,
            self._counts,
        )
        self._start_afresh()
        return self._launch(pending)

    def take_tokens(self) -> int | None:
        """Return the tokens in the losses since the last reduction; the next one has later ones.

        A collective over all ranks that waits for the device.

        Returns:
            The number over all ranks; None if no loss function returned one.
        """
        numbers = torch.zeros(2, dtype=torch.float64, device=self._device)
        if self._counts:
            numbers[0] += 1.0
            numbers[1] += torch.stack(self._counts).sum()
            self._counts = []
        if self._size > 1:
            dist.all_reduce(numbers, group=self._group)
        counted, tokens = numbers.tolist()
        return int(tokens) if counted else None

    def _accumulate_of_all_ranks(self, metrics: Mapping[str, Metric]) -> None:
        if metrics:
            shared = {key: snapshot(metric, self._device) for key, metric in metrics.items()}
            kinds = {key: metric.kind for key, metric in shared.items()}
            self._open.append(self._stack([shared], kinds))
            self._is_open = True

    def _close_step(self, steps: Steps) -> None:
        steps.add(self._open, self._open_weights)
        self._open, self._open_weights, self._is_open = [], [], False

    def _start_afresh(self) -> None:
        self._open, self._open_weights, self._is_open = [], [], False
        self._taken, self._skipped = Steps(), Steps()
        self._conflicts, self._patterns = set(), set()
        self._microbatches, self._samples, self._counts = 0, 0, []

    def _launch(self, pending: _Pending) -> "ReducedMetrics":
        layout = _Layout(
            dict(self._agreed), self._size, self._normalization, steps=pending.steps.number
        )
        vector = self._pack(layout, pending)
        if self._size > 1:
            dist.all_reduce(vector, group=self._group)
        return ReducedMetrics(layout, vector, self._rank, lambda: self._agree_and_repeat(pending))

    def _agree_and_repeat(self, pending: _Pending) -> "ReducedMetrics":
        """Exchange the keys over the group, extend the agreed ones, and reduce once more."""
        mine = (
            [item for group in pending.steps.groups for item in group.keys],
            sorted(pending.conflicts),
            sorted(pending.patterns),
        )
        conflicts: set[str] = set()
        patterns: set[str] = set()
        for keys, own_conflicts, own_patterns in from_every_rank(mine, self._group):
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

    def _stack(self, records: Sequence[Mapping[str, Metric]], kinds: dict[str, Kind]) -> Block:
        """Stack K keys of M records' metrics with one kernel, Python numbers aside."""
        keys, width = tuple(kinds.items()), len(records)
        half = len(keys) * width
        # Lists, as writing to single elements of a tensor takes microseconds each.
        cells, host, present = [self._zero] * (2 * half), [0.0] * (2 * half), [0.0] * half
        for row, (key, kind) in enumerate(keys):
            for place, record in enumerate(records, row * width):
                metric = record.get(key)
                if metric is None:
                    host[place] = -math.inf if kind == "maximum" else 0.0
                    continue
                present[place] = 1.0
                for index, number in ((place, metric.value), (half + place, metric.count)):
                    if isinstance(number, torch.Tensor):
                        cells[index] = number
                    else:
                        host[index] = number
        values = torch.stack(cells).view(2, len(keys), width)
        if any(host):
            of_host = torch.tensor(host, dtype=torch.float64).view_as(values)
            values += _to_device(of_host, self._device)
        return Block(keys, values, torch.tensor(present, dtype=torch.float64).view(-1, width))

    def _weighted(self, block: Block, weight: int, copies: int) -> Block:
        """Give the microbatches of a block their weight in means, and count their samples once."""
        if weight == copies == 1:
            return block
        factors = [
            1.0 if kind == "maximum" else weight if kind in ("mean", "local") else 1 / copies
            for _, kind in block.keys
        ]
        factor = _to_device(torch.tensor(factors, dtype=torch.float64), self._device)
        return Block(block.keys, block.values * factor[:, None], block.present * weight)

    def _pack(self, layout: "_Layout", pending: _Pending) -> torch.Tensor:
        """Put this rank's sums at the registered keys' offsets in a vector of zeros."""
        host = torch.zeros(layout.length, dtype=torch.float64)
        groups = pending.steps.groups
        known = all(layout.kinds.get(k) == kind for group in groups for k, kind in group.keys)
        host[layout.CHANGED] = float(not known or bool(pending.conflicts))
        host[layout.MICROBATCHES] = pending.microbatches
        host[layout.SAMPLES] = pending.samples
        host[layout.COUNTED] = float(bool(pending.counts))
        for first in layout.maxima.values():
            host[first + self._rank] = -torch.inf
        for group in groups:
            self._count_reports(layout, group, host)
        vector = _to_device(host, self._device)
        for group in groups:
            values = group.values()
            self._add_sums(layout, group, values, vector)
            self._add_maxima(layout, group, values, vector)
        if layout.by_ratio and self._contributes:
            self._add_ratios(layout, pending.steps, vector)
        if pending.alarm is not None:
            vector[layout.ALARM] += pending.alarm
        if pending.counts:
            vector[layout.TOKENS] += torch.stack(pending.counts).sum()
        return vector

    def _count_reports(self, layout: "_Layout", group: Group, host: torch.Tensor) -> None:
        reports = group.present().sum(dim=2)
        rows = layout.rows(group.keys, lambda kind: not (layout.by_ratio and kind == "token_mean"))
        places = [layout.place(step, key) for step in group.steps for _, key in rows]
        host.index_add_(0, torch.tensor(places, dtype=torch.int64), reports[:, _of(rows)].flatten())
        for row, (key, kind) in enumerate(group.keys):
            if kind == "local" and key in layout.locals:
                host[layout.locals[key] + self._rank] += reports[:, row].sum()

    def _add_sums(
        self, layout: "_Layout", group: Group, values: torch.Tensor, vector: torch.Tensor
    ) -> None:
        def is_sum(kind: Kind) -> bool:
            by_ratio = kind == "token_mean" and layout.by_ratio
            return kind not in ("maximum", "local") and not by_ratio

        sums = values.sum(dim=3)
        if rows := layout.rows(group.keys, is_sum):
            places = [
                layout.place(step, key) + part
                for step in group.steps
                for part in (1, 2)
                for _, key in rows
            ]
            found = sums if len(rows) == len(group.keys) else sums[:, :, self._index(_of(rows))]
            vector.index_add_(0, self._index(places), found.flatten())
        for row, (key, kind) in enumerate(group.keys):
            if kind == "local" and key in layout.locals:
                vector[layout.locals[key] + layout.size + self._rank] += sums[:, 0, row].sum()

    def _add_maxima(
        self, layout: "_Layout", group: Group, values: torch.Tensor, vector: torch.Tensor
    ) -> None:
        for row, (key, kind) in enumerate(group.keys):
            if kind == "maximum" and key in layout.maxima:
                mine = vector[layout.maxima[key] + self._rank]
                torch.maximum(mine, values[:, 0, row].amax(), out=mine)

    def _add_ratios(self, layout: "_Layout", steps: Steps, vector: torch.Tensor) -> None:
        """Divide each microbatch's sums over the context-parallel ranks, then add the ratios."""
        keys = [key for key, kind in layout.kinds.items() if kind == "token_mean"]
        if not keys or not steps.step_of_column:
            return
        # Context-parallel ranks have the same microbatches, and each perhaps other keys.
        together = vector.new_zeros(3, len(keys), len(steps.step_of_column))
        for group in steps.groups:
            present = group.present()
            columns = [first + m for first in group.columns for m in range(present.shape[2])]
            rows = {key: row for row, (key, kind) in enumerate(group.keys) if kind == "token_mean"}
            found = [(index, rows[key]) for index, key in enumerate(keys) if key in rows]
            if not found:
                continue
            stacked = torch.cat((group.values(), _to_device(present, self._device)[:, None]), dim=1)
            of_keys = stacked.permute(1, 2, 0, 3).flatten(2)[:, self._index(_of(found, 1))]
            part = torch.zeros_like(together[:, : len(found)])
            part.index_copy_(2, self._index(columns), of_keys)
            together.index_add_(1, self._index(_of(found)), part)
        if self._cp_size > 1:
            dist.all_reduce(together, group=self._cp_group)
        sums, counts, present = together
        # As the objective has it: a microbatch without tokens is a loss of sum / 1.
        ratios = torch.where(counts == 0, sums, sums / counts)
        numbers = torch.stack(((present > 0).double(), ratios, counts))
        if set(steps.weights) != {1}:
            numbers = numbers * self._index(steps.weights)
        places = [
            layout.place(step, layout.index[key]) + part
            for part in range(3)
            for key in keys
            for step in steps.step_of_column
        ]
        vector.index_add_(0, self._index(places), numbers.flatten())

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        key = tuple(numbers)
        if key not in self._indices:
            self._indices[key] = _to_device(torch.tensor(key, dtype=torch.int64), self._device)
        return self._indices[key]


class _Layout:
    """Offsets of the registered keys in the vector that is all-reduced.

    ``[changed, alarm, microbatches, samples, counted, tokens, (reports, sum, count) for each step
    and key, slots per rank]``. A maximum has one slot per rank and a local metric two, of all
    ranks' reports and then of their sums: each rank fills its own, so that they travel in a sum
    unchanged. These are of all steps together.
    """

    CHANGED = 0
    ALARM = 1
    MICROBATCHES = 2
    SAMPLES = 3
    COUNTED = 4
    TOKENS = 5
    FIRST_KEY = 6

    def __init__(self, kinds: dict[str, Kind], size: int, normalization: str, *, steps: int):
        self.kinds = kinds
        self.by_ratio = normalization == "microbatch"
        self.size = size
        self.steps = steps
        self.index = {key: index for index, key in enumerate(kinds)}
        self.maxima: dict[str, int] = {}
        self.locals: dict[str, int] = {}
        self.length = self.FIRST_KEY + 3 * steps * len(kinds)
        for key, kind in kinds.items():
            if kind == "maximum":
                self.maxima[key] = self.length
                self.length += size
            elif kind == "local":
                self.locals[key] = self.length
                self.length += 2 * size

    def place(self, step: int, index: int) -> int:
        """Return the offset of a key's numbers of a step."""
        return self.FIRST_KEY + 3 * (step * len(self.kinds) + index)

    def rows(
        self, keys: Sequence[tuple[str, Kind]], is_wanted: Callable[[Kind], bool]
    ) -> list[tuple[int, int]]:
        """Return the number among `keys` and the registered number, of wanted registered keys."""
        return [
            (row, self.index[key])
            for row, (key, kind) in enumerate(keys)
            if self.kinds.get(key) == kind and is_wanted(kind)
        ]

    def cells(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the numbers of all steps and keys, [steps, keys, 3]."""
        end = self.FIRST_KEY + 3 * self.steps * len(self.kinds)
        return vector[self.FIRST_KEY : end].view(self.steps, len(self.kinds), 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A reduction's result on the host."""

    values: dict[str, float | None]
    alarm: bool
    microbatches: int
    samples: int
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
        A token mean over no token is None; a NaN is what some rank reported. A key that nobody
        reported is left out. Only `local` ones differ: each rank that reported one has its own, the
        others that of the first.

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
    def samples(self) -> int:
        """The weights that `MetricReducer.accumulate` gave them, in sum; waits, as `to_dict`."""
        return self._resolve().samples

    @property
    def tokens(self) -> int | None:
        """Tokens in their losses; None if the loss functions count none. It waits, as `to_dict`."""
        return self._resolve().tokens

    @property
    def token_count(self) -> torch.Tensor:
        """The number of ranks that count tokens and their tokens, on the device."""
        return self._vector[_Layout.COUNTED : _Layout.TOKENS + 1]

    def _resolve(self) -> "_Read":
        if self._read is None:
            vector = self._vector.cpu()
            header = vector[: _Layout.FIRST_KEY].tolist()
            if header[_Layout.CHANGED]:
                self._read = self._repeat()._resolve()
            else:
                self._read = _Read(
                    values=self._values(vector),
                    alarm=header[_Layout.ALARM] != 0,
                    microbatches=int(header[_Layout.MICROBATCHES]),
                    samples=int(header[_Layout.SAMPLES]),
                    tokens=int(header[_Layout.TOKENS]) if header[_Layout.COUNTED] else None,
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
        """Return the mean over this rank's reports of a local metric, else the first rank's."""
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
    return float("nan") if any(n != n for n in numbers) else max(numbers)


def _of(pairs: Sequence[tuple[int, int]], part: int = 0) -> list[int]:
    return [pair[part] for pair in pairs]


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy host memory to the device without waiting for it; a copy on the CPU too."""
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)
