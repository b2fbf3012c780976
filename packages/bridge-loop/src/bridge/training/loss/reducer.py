"""The reduction of metrics over microbatches, ranks and steps, in one collective.

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

which for a loss is the value that Megatron-LM logs: the mean of the steps' losses, each step with
the same weight however many tokens it has. Skipped steps are not averaged, unless all of them were
skipped. An evaluation is reduced as one step, whatever its number of batches.

All sums are float64, so that counts are exact beyond 2**24.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist

from bridge.training.loss.interval import FOLD_AT, Block, Steps
from bridge.training.loss.metrics import Kind, Metric, MicrobatchRecord, snapshot
from bridge.training.loss.reduced import ReducedMetrics
from bridge.training.loss.vector import Contribution, VectorLayout, VectorPacker, to_device
from bridge.training.ranks.collectives import from_every_rank
from bridge.training.usage_error import UsageError


class MetricReducer:
    """A reducer of the records of one or several steps to numbers that are equal on every rank.

    All ranks of the group call the same methods, even those without a record. A training loop
    calls `add_step` after each step and `reduce` where it logs. An evaluation calls `accumulate`
    for each batch, which all belong to one step, and then `reduce`.

    One all-reduce sums all steps of the registered keys. In ``microbatch`` normalization with
    context parallelism there is another one, within the context-parallel group. When some rank
    reports a key that is not registered, the vector has a flag for it, and reading the result
    exchanges the keys and reduces once more.
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
            device: The device on which the collective runs.
            group: The ranks that get the result; the default group, or without
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
        self._packer = VectorPacker(
            rank=self._rank,
            device=device,
            contributes=contributes,
            context_parallel_size=context_parallel_size,
            context_parallel_group=context_parallel_group,
        )
        self._registered: dict[str, Kind] = {}
        # The current step's blocks and weights of its microbatches, then complete steps.
        self._open: list[Block] = []
        self._open_weights: list[int] = []
        self._is_open = False
        self._taken, self._skipped = Steps(), Steps()
        self._conflicts: set[str] = set()
        self._patterns: set[str] = set()
        self._microbatches = self._samples = 0
        self._counts: list[torch.Tensor] = []
        self._zero = torch.zeros((), dtype=torch.float64, device=device)

    def fresh(self) -> "MetricReducer":
        """Return a reducer with nothing accumulated, for the same ranks and registered keys.

        Records that are accumulated in it and never reduced, such as those of an evaluation that
        raised, reach no other reduction. The two share the registered keys.
        """
        reducer = copy.copy(self)
        reducer._clear()
        return reducer

    def accumulate(
        self, records: Iterable[MicrobatchRecord], *, weight: int = 1, repeats: int = 1
    ) -> None:
        """Add microbatches to the current step; no collective, no host-device sync.

        Args:
            records: The records of the microbatches.
            weight: The weight of each in a mean over microbatches: its samples, where microbatches
                have several sizes.
            repeats: How often each sample is in its microbatch; sums are divided by it.
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
            block = self._weight(block, weight, repeats)
            self._open.append(replace(block, column=len(self._open_weights)))
        self._open_weights += [weight] * len(records)
        self._is_open = True
        self.count(len(records), weight=weight)
        if self._contributes:
            counts = [record.count for record in records if record.count is not None]
            if counts and repeats > 1:
                counts = [torch.stack(counts).sum() // repeats]
            self._counts += counts
            if len(self._counts) >= FOLD_AT:
                self._counts = [torch.stack(self._counts).sum()]

    def count(self, microbatches: int, *, weight: int = 1) -> None:
        """Count microbatches without metrics, such as those whose data was collected."""
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
        """Add a training step to the next reduction; no collective, no host-device sync.

        Args:
            records: The step's records that the schedule returned, one for each microbatch.
            of_all_ranks: Totals and ratios of the step, from every rank that has any: they count
                even on a rank whose records do not (`contributes`).
            is_skipped: Whether the optimizer's step was skipped, which must be the same on every
                rank. Then the metrics are not averaged, but tokens and microbatches are counted.
        """
        self.accumulate(records)
        if of_all_ranks:
            shared = {key: snapshot(metric, self._device) for key, metric in of_all_ranks.items()}
            kinds = {key: metric.kind for key, metric in shared.items()}
            self._open.append(self._stack([shared], kinds))
        if self.average == "step":
            self._taken, self._skipped = Steps(), Steps()
        self._close_step(self._skipped if is_skipped else self._taken)

    def reduce(
        self,
        records: Iterable[MicrobatchRecord] | None = None,
        *,
        anomaly_flag: torch.Tensor | None = None,
    ) -> ReducedMetrics:
        """Reduce the records since the last reduction over the group, and clear them.

        A collective without a host-device sync.

        Args:
            records: More records of the current step, which ends here; after `add_step`, they are
                a step of their own. None where no rank has any.
            anomaly_flag: `LossWatch.anomaly_flag` of this rank.
        """
        if records is not None:
            self.accumulate(records)
        if self._is_open or not (self._taken.number or self._skipped.number):
            self._close_step(self._taken)
        pending = Contribution(
            self._taken if self._taken.number else self._skipped,
            anomaly_flag,
            self._conflicts,
            self._patterns,
            self._microbatches,
            self._samples,
            self._counts,
        )
        self._clear()
        return self._launch(pending)

    def take_tokens(self) -> int | None:
        """Return the tokens in the losses since the last reduction, and clear them.

        A collective over all ranks and a host-device sync.

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

    def _close_step(self, steps: Steps) -> None:
        steps.add(self._open, self._open_weights)
        self._open, self._open_weights, self._is_open = [], [], False

    def _clear(self) -> None:
        self._open, self._open_weights, self._is_open = [], [], False
        self._taken, self._skipped = Steps(), Steps()
        self._conflicts, self._patterns = set(), set()
        self._microbatches, self._samples, self._counts = 0, 0, []

    def _launch(self, pending: Contribution) -> ReducedMetrics:
        layout = VectorLayout(
            dict(self._registered), self._size, self._normalization, steps=pending.steps.number
        )
        vector = self._packer.pack(layout, pending)
        if self._size > 1:
            dist.all_reduce(vector, group=self._group)
        return ReducedMetrics(
            layout, vector, self._rank, lambda: self._register_and_repeat(pending)
        )

    def _register_and_repeat(self, pending: Contribution) -> ReducedMetrics:
        """Exchange the keys over the group, register the new ones, and reduce once more."""
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
                if self._registered.setdefault(key, kind) != kind:
                    conflicts.add(f"{key!r} ({self._registered[key]} and {kind})")
        if conflicts:
            raise UsageError(
                f"metrics {', '.join(sorted(conflicts))}: declared with different reductions on "
                "different microbatches, steps or ranks; declare each always the same way"
            )
        if len(patterns) > 1:
            raise UsageError(
                f"loss function: returns {' and '.join(sorted(patterns))} on different ranks, "
                "which weigh microbatches differently; return always the same"
            )
        return self._launch(pending)

    def _stack(self, records: Sequence[Mapping[str, Metric]], kinds: dict[str, Kind]) -> Block:
        """Stack K keys of M records' metrics with one kernel, apart from Python numbers."""
        keys, width = tuple(kinds.items()), len(records)
        half = len(keys) * width
        # Lists, as writing to single elements of a tensor takes microseconds each.
        cells, host, present = [self._zero] * (2 * half), [0.0] * (2 * half), [0.0] * half
        for row, (key, kind) in enumerate(keys):
            for cell, record in enumerate(records, row * width):
                metric = record.get(key)
                if metric is None:
                    host[cell] = -math.inf if kind == "maximum" else 0.0
                    continue
                present[cell] = 1.0
                for index, number in ((cell, metric.value), (half + cell, metric.count)):
                    if isinstance(number, torch.Tensor):
                        cells[index] = number
                    else:
                        host[index] = number
        values = torch.stack(cells).view(2, len(keys), width)
        if any(host):
            of_host = torch.tensor(host, dtype=torch.float64).view_as(values)
            values += to_device(of_host, self._device)
        return Block(keys, values, torch.tensor(present, dtype=torch.float64).view(-1, width))

    def _weight(self, block: Block, weight: int, repeats: int) -> Block:
        """Multiply a block by the microbatches' weights in means, and count their samples once."""
        if weight == repeats == 1:
            return block
        factors = [
            1.0 if kind == "maximum" else weight if kind in ("mean", "local") else 1 / repeats
            for _, kind in block.keys
        ]
        factor = to_device(torch.tensor(factors, dtype=torch.float64), self._device)
        return Block(block.keys, block.values * factor[:, None], block.present * weight)
