"""One call of megatron-core's schedule: forward and backward passes over microbatches."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from bridge.training.contracts import ModuleRanks, own_groups
from bridge.training.loss.adapter import LossAdapter
from bridge.training.state import GlobalState

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def run_schedule(  # noqa: PLR0913  # what a schedule needs
    forward_step: LossAdapter,
    data_iterator: Sequence[Iterator[Any]],
    model: list[torch.nn.Module],
    state: GlobalState,
    *,
    num_microbatches: int,
    pg_collection: "ProcessGroupCollection | ModuleRanks",
    forward_only: bool,
    collect_non_loss_data: bool = False,
    micro_batch_size: int | None = None,
) -> list[Any]:
    """Run megatron-core's schedule for the layout over one batch.

    Args:
        forward_step: The user's forward step, adapted.
        data_iterator: One iterator of this rank's microbatches for each model chunk.
        model: This rank's model chunks.
        state: The run's state.
        num_microbatches: On every rank.
        pg_collection: The process groups.
        forward_only: Without gradients.
        collect_non_loss_data: As for `evaluate`.
        micro_batch_size: Samples of a microbatch; train.micro_batch_size if None.

    Returns:
        What the loss functions returned for reporting, one item a microbatch, on the last pipeline
        stage; an empty list on the others.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.utils import get_model_config

    vp_size = len(model) if len(model) > 1 else None
    model_config = get_model_config(model[0])
    stages = own_groups(pg_collection).pp
    communicator: Any = None
    if isinstance(pg_collection, ModuleRanks):
        schedule = get_forward_backward_func(schedule_pg_collection=cast(Any, pg_collection))
        communicator = pg_collection.communicator(model_config)
    else:
        schedule = get_forward_backward_func(pp_size=stages.size(), vp_size=vp_size)
        if stages.size() > 1:
            communicator = P2PCommunicator(stages, model_config)
    outputs: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=data_iterator if vp_size else data_iterator[0],
        model=model if vp_size else model[0],
        num_microbatches=num_microbatches,
        seq_length=sequence_length(state.cfg.model),
        micro_batch_size=micro_batch_size or state.cfg.train.micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        pg_collection=pg_collection,
        p2p_communicator=communicator,
    )
    return outputs


def has_sequences(model_config: Any) -> bool:
    """Whether a sample of the model has a known number of tokens, ``seq_length``."""
    return bool(getattr(model_config, "seq_length", None))


def sequence_length(model_config: Any) -> int:
    """Return the tokens of a sample; 1 for a model that has no sequences."""
    return int(getattr(model_config, "seq_length", None) or 1)
