"""Losses and token counts of a step, cell by cell, and the objective on them.

A cell is one context-parallel rank's shard of one microbatch. The objective is computed with exact
fractions.
"""

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

type Normalization = Literal["token", "microbatch"]
type Microbatch = Sequence[tuple[int, int]]
"""(sum of losses, tokens) of each context-parallel rank."""
type Cells = Sequence[Sequence[Microbatch]]
"""The microbatches of each data-parallel rank."""

SLOTS = 16
"""Padded tokens of a cell, valid or not."""

CASES: dict[str, Cells] = {
    "A": [[[(2, 1)], [(90, 9)]]],
    "B": [[[(12, 4)], [(30, 12)]], [[(8, 1)], [(6, 3)]]],
    "C": [[[(5, 1), (0, 0)]]],
    "C4": [[[(5, 1), (0, 0), (0, 0), (0, 0)]]],
    "D": [[[(6, 2), (4, 4)], [(9, 1), (0, 0)]], [[(10, 5), (3, 3)], [(0, 0), (0, 0)]]],
    "nothing anywhere": [[[(0, 0)], [(0, 0)]], [[(0, 0)], [(0, 0)]]],
}
TOKEN_MEAN = {
    "A": Fraction(46, 5),
    "B": Fraction(14, 5),
    "C": Fraction(5),
    "C4": Fraction(5),
    "D": Fraction(32, 15),
    "nothing anywhere": None,
}


def world_size(cells: Cells) -> int:
    """Return the number of ranks that hold the cells, without a pipeline."""
    return len(cells) * len(cells[0][0])


def microbatches_of(cells: Cells) -> list[Microbatch]:
    """Return all microbatches in the order in which the loop hands out samples."""
    return [microbatch for at_once in zip(*cells, strict=True) for microbatch in at_once]


def objective(
    microbatches: Sequence[Microbatch], normalization: Normalization, pattern: int
) -> Fraction:
    """Return the loss of all microbatches together; 0 without any token.

    In pattern 1 the loss is the mean over a cell's own tokens.
    """
    cells = [cell for microbatch in microbatches for cell in microbatch]
    if pattern == 1:
        return _mean([Fraction(total, max(tokens, 1)) for total, tokens in cells])
    if normalization == "token":
        return _ratio(cells)
    return _mean([_ratio(microbatch) for microbatch in microbatches])


def random_cells(seed: int, data: int, microbatches: int, context: int) -> Cells:
    """Draw cells of very different sizes, a third of them empty."""
    draw = random.Random(seed)

    def cell() -> tuple[int, int]:
        tokens = draw.choice([0, 0, 1, 2, 5, SLOTS])
        return (draw.randint(1, 60) if tokens else 0), tokens

    return [[[cell() for _ in range(context)] for _ in range(microbatches)] for _ in range(data)]


def _ratio(cells: Sequence[tuple[int, int]]) -> Fraction:
    return Fraction(sum(total for total, _ in cells), max(sum(tokens for _, tokens in cells), 1))


def _mean(values: Sequence[Fraction]) -> Fraction:
    return sum(values, Fraction()) / len(values)
