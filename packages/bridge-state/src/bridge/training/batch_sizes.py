"""Batch sizes: how the samples of a step are divided over replicas and microbatches."""

from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True)
class BatchSizes:
    """The sizes of one step's batch.

    global_batch = microbatches x replicas x micro_batch

    They are those of one step. A schedule that changes the global batch during a run returns
    another object from the step on where it does.
    """

    global_batch: int
    """Samples of a step, over all replicas."""
    micro_batch: int
    """Samples that one replica runs at once."""
    replicas: int
    """Data-parallel replicas of the model."""

    @property
    def global_microbatch(self) -> int:
        """Samples that all replicas run at once, one microbatch each."""
        return self.micro_batch * self.replicas

    @property
    def microbatches(self) -> int:
        """Microbatches of a step on each replica."""
        return self.global_batch // self.global_microbatch

    @property
    def is_divisible(self) -> bool:
        """Whether the samples of a step make the same number of microbatches on every replica."""
        return self.global_batch % self.global_microbatch == 0
