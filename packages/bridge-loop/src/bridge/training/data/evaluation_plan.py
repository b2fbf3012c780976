"""The microbatches of an evaluation, in which every sample counts once under every layout.

All data-parallel ranks run the same number of microbatches, and an interleaved pipeline runs full
groups of them, so the number of samples rarely fits. The samples that are left after the
microbatches of train.micro_batch_size run as

1. one group of smaller microbatches on every rank, as large as the samples fill,
2. one group of the smallest microbatches that the layout allows, of 1 sample in most layouts
   (`ModelRanks.smallest_microbatch`). Surplus microbatches repeat the last sample and do not count,
   so a microbatch counts in full or not at all,
3. where the smallest has more than 1 sample, each of the last samples in a microbatch of its own
   that repeats it: means are the same, sums are divided by the number of repetitions.

Loss functions do not depend on it. A mean over microbatches weighs each by its samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge.training.batch_sizes import BatchSizes
from bridge.training.contracts import DataShard, ModelRanks

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


@dataclass(kw_only=True, frozen=True)
class EvaluationCall:
    """One call of the schedule: the same number of microbatches of one size on every rank."""

    first: int
    """Position of the first sample in the set."""
    samples: int
    """Samples that count, over all ranks; later ones in the microbatches do not."""
    size: int
    """Samples of a microbatch of one replica, repetitions included."""
    microbatches: int
    """Microbatches of each rank."""
    repeats: int = 1
    """Number of times that each sample is in its microbatch."""

    @property
    def weight(self) -> int:
        """Samples that a microbatch counts for."""
        return self.size // self.repeats

    def counted(self, replica: int, replicas: int) -> int:
        """Return the number of a replica's microbatches that count: the first ones.

        Args:
            replica: Number of the replica, from 0 on.
            replicas: Number of replicas.
        """
        left = self.samples - replica * self.weight
        return max(0, min(self.microbatches, -(-left // (replicas * self.weight))))

    def positions(self, shard: DataShard) -> Iterator[list[int]]:
        """Yield the positions of the samples in each of a rank's microbatches.

        Args:
            shard: The rank's part of each global microbatch, for microbatches of `size`.
        """
        last = self.first + self.samples - 1
        for number in range(self.microbatches):
            start = (number * shard.size + shard.rank) * shard.samples
            offsets = range(start, start + shard.samples)
            yield [min(self.first + offset // self.repeats, last) for offset in offsets]


def plan_evaluation(
    num_samples: int,
    sizes: BatchSizes,
    *,
    group: int = 1,
    smallest: int = 1,
) -> list[list[EvaluationCall]]:
    """Return the calls of the schedule for each global batch of an evaluation.

    Args:
        num_samples: Samples from the set's beginning.
        sizes: Those of a training step, whose microbatches it runs while there are samples.
        group: Microbatches of which a call runs a multiple.
        smallest: Samples of which each microbatch must be a multiple; a divisor of the usual size.
    """
    return [
        _calls_of_batch(
            first,
            min(first + sizes.global_batch, num_samples),
            sizes,
            group=group,
            smallest=smallest,
        )
        for first in range(0, num_samples, sizes.global_batch)
    ]


def _calls_of_batch(
    first: int, end: int, sizes: BatchSizes, *, group: int, smallest: int
) -> list[EvaluationCall]:
    """Divide the samples from first to end."""
    # Microbatches of a group, over all replicas.
    per_group = sizes.replicas * group
    calls: list[EvaluationCall] = []

    def add(samples: int, size: int, repeats: int = 1) -> None:
        nonlocal first
        if samples:
            groups = -(-samples * repeats // (per_group * size))
            calls.append(
                EvaluationCall(
                    first=first,
                    samples=samples,
                    size=size,
                    microbatches=groups * group,
                    repeats=repeats,
                )
            )
            first += samples

    usual = per_group * sizes.micro_batch
    add((end - first) // usual * usual, sizes.micro_batch)
    if smaller := (end - first) // (per_group * smallest) * smallest:
        add(per_group * smaller, smaller)
    add((end - first) // smallest * smallest, smallest)
    add(end - first, smallest, repeats=smallest)
    return calls


def plan_of_run(
    config: "ConfigContainer",
    ranks: ModelRanks,
    num_samples: int,
    *,
    is_interleaved: bool,
) -> list[list[EvaluationCall]]:
    """Return the calls of an evaluation in a run.

    Args:
        config: The run's configuration, resolved.
        ranks: The division of the model over the ranks.
        num_samples: Samples from the set's beginning.
        is_interleaved: Whether each rank has several model chunks.
    """
    group = 1
    if is_interleaved:
        group = getattr(config.model, "microbatch_group_size_per_vp_stage", None) or 0
        group = group or int(ranks.groups.pp.size())
    return plan_evaluation(
        num_samples,
        config.train.batch_sizes(ranks.replicas),
        group=group,
        smallest=ranks.smallest_microbatch,
    )
