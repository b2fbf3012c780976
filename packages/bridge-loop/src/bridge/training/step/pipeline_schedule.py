"""One call of megatron-core's schedule: forward and backward passes over microbatches."""

from dataclasses import dataclass
from typing import Any

from bridge.training.config import ConfigContainer
from bridge.training.contracts import ModelRanks
from bridge.training.loss.normalization import LossAdapter


@dataclass(kw_only=True, frozen=True)
class Schedule:
    """megatron-core's schedule for the layout, over one source of microbatches."""

    forward_step: LossAdapter
    """The adapter around the user's forward step."""
    data_iterator: list[Any]
    """One iterator of this rank's microbatches for each model chunk."""
    model: list[Any]
    """This rank's model chunks."""
    ranks: ModelRanks
    """The division of the model over the ranks."""
    config: ConfigContainer
    """The run's configuration."""

    def run(
        self,
        num_microbatches: int,
        *,
        micro_batch_size: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        """Run the model over one batch.

        Args:
            num_microbatches: Microbatches of each rank.
            micro_batch_size: Samples of a microbatch; train.micro_batch_size if None.
            forward_only: Whether to run without backward passes.
            collect_non_loss_data: As for `evaluate`.

        Returns:
            On the last pipeline stage one item for each microbatch: its `MicrobatchRecord`, or the
            data that was collected. An empty list on the other stages.
        """
        is_interleaved = len(self.model) > 1
        return self.ranks.schedule(self.model)(
            forward_step_func=self.forward_step,
            data_iterator=self.data_iterator if is_interleaved else self.data_iterator[0],
            model=self.model if is_interleaved else self.model[0],
            num_microbatches=num_microbatches,
            seq_length=sequence_length(self.config.model) or 1,
            micro_batch_size=micro_batch_size or self.config.train.micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )


def sequence_length(model_config: Any) -> int | None:
    """Return the tokens of a sample, ``seq_length``; None for a model that has no sequences."""
    return getattr(model_config, "seq_length", None) or None
