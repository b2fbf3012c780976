"""The packing plan: samples to sequences by first fit, from lengths and seed alone."""

from collections.abc import Sequence

import numpy as np
import torch


def plan_packing(lengths: Sequence[int], capacity: int, *, seed: int | None) -> list[list[int]]:
    """Put samples into sequences, each into the first that has room for it.

    Args:
        lengths: Tokens of each sample, with its padding; none is above `capacity`.
        capacity: Tokens of a sequence.
        seed: Seed of the order in which samples are put; None for the order of `lengths`.

    Returns:
        The indices of the samples in each sequence.
    """
    count = len(lengths)
    if seed is None:
        order = list(range(count))
    else:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator).tolist()
    rooms = _Rooms(count, capacity)
    sequences: list[list[int]] = []
    for index in order:
        number = rooms.take_first(lengths[index])
        if number == len(sequences):
            sequences.append([])
        sequences[number].append(index)
    return sequences


class _Rooms:
    """The room left in each sequence, as a binary tree: a node holds the largest room below it.

    The first sequence with enough room is found in logarithmic time.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._largest = np.full(2 * self._leaves, capacity).tolist()

    def take_first(self, length: int) -> int:
        """Take `length` tokens of room in the first sequence that has them; return its number."""
        largest, node = self._largest, 1
        while node < self._leaves:
            node *= 2
            if largest[node] < length:
                node += 1
        largest[node] -= length
        number: int = node - self._leaves
        while node > 1:
            node //= 2
            largest[node] = max(largest[2 * node], largest[2 * node + 1])
        return number
