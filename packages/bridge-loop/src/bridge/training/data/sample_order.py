"""The order in which samples are drawn, and each rank's microbatches of it.

The order is a function of the seed and the dataset alone. The position in it is the number of
samples consumed: that one number resumes a run exactly, at no cost. A global batch is cut into
microbatches of consecutive samples, and microbatch k goes to data-parallel rank k mod D. So every
layout trains on the same samples at the same step, in the same microbatches. Modules with ranks of
their own cut each D microbatches into as many shards as the module has replicas
(`bridge.training.contracts.DataShard`), so all of them see the same samples as well.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import override

import torch
from torch.utils.data import Sampler

from bridge.training.contracts import DataShard, ModelRanks
from bridge.training.data.evaluation_plan import EvaluationCall


class SampleOrder:
    """The endless order in which the samples of a dataset are drawn.

    Args:
        size: Number of samples of the dataset.
        shuffle: Draw a new permutation each epoch, from the seed and the epoch's number.
        seed: Seed of the permutations.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int) -> None:
        self.size = size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if not self._shuffle:
            return offset
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._permutation = torch.randperm(self.size, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[offset]

    @property
    def fingerprint(self) -> str:
        """The name of the order: equal fingerprints draw equal samples."""
        order = f"shuffled with seed {self._seed}" if self._shuffle else "in the dataset's order"
        return f"{self.size} samples {order}"


class MicrobatchSampler(Sampler[list[int]]):
    """A sampler of the indices of this rank's training microbatches, endless.

    Args:
        order: The order of the samples.
        shard: The part of each global microbatch that this rank reads.
        start: Samples consumed before.
    """

    def __init__(self, order: SampleOrder, shard: DataShard, *, start: int) -> None:
        self._order = order
        self._shard = shard
        self._start = start

    @override
    def __iter__(self) -> Iterator[list[int]]:
        size = self._shard.samples
        for block in itertools.count(self._start, size * self._shard.size):
            first = block + self._shard.rank * size
            yield [self._order[first + i] for i in range(size)]


class EvaluationSampler(Sampler[list[int]]):
    """A sampler of the indices of this rank's microbatches of an evaluation.

    Args:
        batches: The calls of `bridge.training.data.evaluation_plan.plan_of_run`.
        ranks: The division of the model over the ranks.
    """

    def __init__(self, batches: Sequence[Sequence[EvaluationCall]], ranks: ModelRanks) -> None:
        self._batches = batches
        self._ranks = ranks

    @override
    def __iter__(self) -> Iterator[list[int]]:
        for call in itertools.chain(*self._batches):
            yield from call.positions(self._ranks.shard(call.size))
