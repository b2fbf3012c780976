"""Which samples share a sequence: first fit, a function of the lengths and the seed alone."""

from collections.abc import Sequence

import numpy as np
import torch


def packing_plan(lengths: Sequence[int], capacity: int, *, seed: int | None) -> list[list[int]]:
    """Put samples into sequences, each into the first that has room for it.

    Args:
        lengths: Places that each sample takes; none is above `capacity`.
        capacity: Places of a sequence.
        seed: Shuffles the samples first; None takes them in their order.

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
    packs: list[list[int]] = []
    for index in order:
        place = rooms.take_first(lengths[index])
        if place == len(packs):
            packs.append([])
        packs[place].append(index)
    return packs


class _Rooms:
    """The room in each of many sequences; finds the first with enough in logarithmic time.

    A tree over the sequences: each node holds the largest room below it.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._largest = np.full(2 * self._leaves, capacity).tolist()

    def take_first(self, length: int) -> int:
        """Take `length` places in the first sequence that has them; return its number."""
        largest, node = self._largest, 1
        while node < self._leaves:
            node *= 2
            if largest[node] < length:
                node += 1
        largest[node] -= length
        place: int = node - self._leaves
        while node > 1:
            node //= 2
            largest[node] = max(largest[2 * node], largest[2 * node + 1])
        return place
