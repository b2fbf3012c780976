"""This rank's metrics of the steps of an interval, kept on the device until they are reduced.

A step costs one kernel, which stacks its numbers (`MetricReducer.accumulate`). An interval costs
16 bytes for each metric, microbatch and step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bridge.training.loss.metrics import Kind

FOLD_AT = 256
"""Number of small tensors that are kept before they are concatenated."""


@dataclass(frozen=True, slots=True)
class Block:
    """The metrics of some microbatches of a step, stacked: K keys, M microbatches."""

    keys: tuple[tuple[str, Kind], ...]
    values: torch.Tensor
    """float64 [2, K, M]: values and counts; where absent 0, or -inf for a maximum."""
    present: torch.Tensor
    """float64 [K, M] in host memory: the microbatch's weight in a mean where it reported the key,
    else 0. The values of means are multiplied by it."""
    column: int = 0
    """Index of the block's first microbatch within its step."""


@dataclass(slots=True)
class Group:
    """N blocks of several steps, with the same K keys and M microbatches."""

    keys: tuple[tuple[str, Kind], ...]
    steps: list[int] = field(default_factory=list)
    """Index of each block's step."""
    columns: list[int] = field(default_factory=list)
    """Index of each block's first microbatch, counted over all steps (`Steps`)."""
    _values: list[torch.Tensor] = field(default_factory=list)
    _present: list[torch.Tensor] = field(default_factory=list)

    def add(self, block: Block, step: int, column: int) -> None:
        """Append a block; one kernel every few hundred blocks."""
        self.steps.append(step)
        self.columns.append(column)
        self._values.append(block.values[None])
        self._present.append(block.present[None])
        if len(self._values) == FOLD_AT:
            self._values, self._present = [self.values()], [self.present()]

    def values(self) -> torch.Tensor:
        """Return float64 [N, 2, K, M], on the device."""
        return torch.cat(self._values)

    def present(self) -> torch.Tensor:
        """Return float64 [N, K, M], in host memory."""
        return torch.cat(self._present)


class Steps:
    """This rank's metrics of the steps that are averaged."""

    def __init__(self) -> None:
        self.number = 0
        self.step_of_column: list[int] = []
        """The index of each microbatch's step."""
        self.weights: list[int] = []
        """The weight of each microbatch in a mean."""
        self._groups: dict[tuple[Any, int], Group] = {}

    @property
    def groups(self) -> list[Group]:
        """The blocks of all steps."""
        return list(self._groups.values())

    def add(self, blocks: Sequence[Block], weights: Sequence[int]) -> None:
        """Append a step, with the weight of each of its microbatches."""
        for block in blocks:
            kind = block.keys, block.present.shape[1]
            group = self._groups.setdefault(kind, Group(block.keys))
            group.add(block, self.number, len(self.step_of_column) + block.column)
        self.step_of_column += [self.number] * len(weights)
        self.weights += weights
        self.number += 1
