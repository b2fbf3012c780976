"""The vector that one all-reduce sums over the ranks: its layout, and each rank's part in it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bridge.training.loss.interval import Group, Steps
from bridge.training.loss.metrics import Kind


@dataclass(frozen=True, slots=True)
class Contribution:
    """This rank's part of a reduction."""

    steps: Steps
    anomaly_flag: torch.Tensor | None
    conflicts: set[str]
    patterns: set[str]
    microbatches: int
    samples: int
    counts: list[torch.Tensor]
    """Tokens of the microbatches that have a count, in sums."""


class VectorLayout:
    """Offsets of the registered keys in the vector that is all-reduced.

    ``[changed, anomaly, microbatches, samples, counted, tokens, (reports, sum, count) for each step
    and key, offsets by rank]``. A maximum has one offset for each rank. A local metric has two: all
    ranks' reports, then all ranks' sums. Each rank fills its own, which the others' zeros leave
    unchanged in the all-reduced sum. These are of all steps together.
    """

    CHANGED = 0
    ANOMALY = 1
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

    def offset(self, step: int, index: int) -> int:
        """Return the offset of a key's numbers of a step."""
        return self.FIRST_KEY + 3 * (step * len(self.kinds) + index)

    def rows(
        self, keys: Sequence[tuple[str, Kind]], is_wanted: Callable[[Kind], bool]
    ) -> dict[int, int]:
        """Return the registered index of each wanted key, by its index in `keys`."""
        return {
            row: self.index[key]
            for row, (key, kind) in enumerate(keys)
            if self.kinds.get(key) == kind and is_wanted(kind)
        }

    def cells(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the numbers of all steps and keys, [steps, keys, 3]."""
        end = self.FIRST_KEY + 3 * self.steps * len(self.kinds)
        return vector[self.FIRST_KEY : end].view(self.steps, len(self.kinds), 3)


class VectorPacker:
    """The packing of this rank's part of a reduction into a vector.

    Args:
        rank: This rank in the group.
        device: The device of the vector.
        contributes: As for `bridge.training.loss.reducer.MetricReducer`.
        context_parallel_size: Ranks that share a microbatch's sequences.
        context_parallel_group: Those ranks.
    """

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        contributes: bool,
        context_parallel_size: int,
        context_parallel_group: dist.ProcessGroup | None,
    ) -> None:
        self._rank = rank
        self._device = device
        self._contributes = contributes
        self._cp_size = context_parallel_size
        self._cp_group = context_parallel_group
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}

    def pack(self, layout: VectorLayout, contribution: Contribution) -> torch.Tensor:
        """Return a vector of zeros with this rank's sums at their offsets."""
        host = torch.zeros(layout.length, dtype=torch.float64)
        groups = contribution.steps.groups
        known = all(layout.kinds.get(k) == kind for group in groups for k, kind in group.keys)
        host[layout.CHANGED] = float(not known or bool(contribution.conflicts))
        host[layout.MICROBATCHES] = contribution.microbatches
        host[layout.SAMPLES] = contribution.samples
        host[layout.COUNTED] = float(bool(contribution.counts))
        for first in layout.maxima.values():
            host[first + self._rank] = -torch.inf
        for group in groups:
            self._count_reports(layout, group, host)
        vector = to_device(host, self._device)
        for group in groups:
            values = group.values()
            self._add_sums(layout, group, values, vector)
            self._add_maxima(layout, group, values, vector)
        if layout.by_ratio and self._contributes:
            self._add_ratios(layout, contribution.steps, vector)
        if contribution.anomaly_flag is not None:
            vector[layout.ANOMALY] += contribution.anomaly_flag
        if contribution.counts:
            vector[layout.TOKENS] += torch.stack(contribution.counts).sum()
        return vector

    def _count_reports(self, layout: VectorLayout, group: Group, host: torch.Tensor) -> None:
        reports = group.present().sum(dim=2)
        rows = layout.rows(group.keys, lambda kind: not (layout.by_ratio and kind == "token_mean"))
        offsets = [layout.offset(step, key) for step in group.steps for key in rows.values()]
        host.index_add_(0, torch.tensor(offsets, dtype=torch.int64), reports[:, [*rows]].flatten())
        for row, (key, kind) in enumerate(group.keys):
            if kind == "local" and key in layout.locals:
                host[layout.locals[key] + self._rank] += reports[:, row].sum()

    def _add_sums(
        self, layout: VectorLayout, group: Group, values: torch.Tensor, vector: torch.Tensor
    ) -> None:
        def is_sum(kind: Kind) -> bool:
            by_ratio = kind == "token_mean" and layout.by_ratio
            return kind not in ("maximum", "local") and not by_ratio

        sums = values.sum(dim=3)
        if rows := layout.rows(group.keys, is_sum):
            offsets = [
                layout.offset(step, key) + part
                for step in group.steps
                for part in (1, 2)
                for key in rows.values()
            ]
            found = sums if len(rows) == len(group.keys) else sums[:, :, self._index(rows)]
            vector.index_add_(0, self._index(offsets), found.flatten())
        for row, (key, kind) in enumerate(group.keys):
            if kind == "local" and key in layout.locals:
                vector[layout.locals[key] + layout.size + self._rank] += sums[:, 0, row].sum()

    def _add_maxima(
        self, layout: VectorLayout, group: Group, values: torch.Tensor, vector: torch.Tensor
    ) -> None:
        for row, (key, kind) in enumerate(group.keys):
            if kind == "maximum" and key in layout.maxima:
                mine = vector[layout.maxima[key] + self._rank]
                torch.maximum(mine, values[:, 0, row].amax(), out=mine)

    def _add_ratios(self, layout: VectorLayout, steps: Steps, vector: torch.Tensor) -> None:
        """Divide each microbatch's sums over the context-parallel ranks, then add the ratios."""
        keys = [key for key, kind in layout.kinds.items() if kind == "token_mean"]
        if not keys or not steps.step_of_column:
            return
        # Context-parallel ranks have the same microbatches, but may have different keys.
        together = vector.new_zeros(3, len(keys), len(steps.step_of_column))
        for group in steps.groups:
            present = group.present()
            columns = [first + m for first in group.columns for m in range(present.shape[2])]
            rows = {key: row for row, (key, kind) in enumerate(group.keys) if kind == "token_mean"}
            found = {index: rows[key] for index, key in enumerate(keys) if key in rows}
            if not found:
                continue
            stacked = torch.cat((group.values(), to_device(present, self._device)[:, None]), dim=1)
            of_keys = stacked.permute(1, 2, 0, 3).flatten(2)[:, self._index(found.values())]
            part = torch.zeros_like(together[:, : len(found)])
            part.index_copy_(2, self._index(columns), of_keys)
            together.index_add_(1, self._index(found), part)
        if self._cp_size > 1:
            dist.all_reduce(together, group=self._cp_group)
        sums, counts, present = together
        # As in the objective: a microbatch without tokens is a loss of sum / 1.
        ratios = torch.where(counts == 0, sums, sums / counts)
        numbers = torch.stack(((present > 0).double(), ratios, counts))
        if set(steps.weights) != {1}:
            numbers = numbers * self._index(steps.weights)
        offsets = [
            layout.offset(step, layout.index[key]) + part
            for part in range(3)
            for key in keys
            for step in steps.step_of_column
        ]
        vector.index_add_(0, self._index(offsets), numbers.flatten())

    def _index(self, numbers: Iterable[int]) -> torch.Tensor:
        key = tuple(numbers)
        if key not in self._indices:
            self._indices[key] = to_device(torch.tensor(key, dtype=torch.int64), self._device)
        return self._indices[key]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy host memory to the device without a host-device sync; on the CPU, clone it."""
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)
