"""Evaluation: the training schedule, forward only, and the same reduction as in training.

The value of a metric is the sum over the whole set of its sums, divided by the sum of its counts:
it does not depend on batch sizes or on the layout.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bridge.training.loss_adapter import LossAdapter
from bridge.training.loss_reduction import MetricReducer
from bridge.training.model_building import parameters_in_sync
from bridge.training.state import GlobalState

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(kw_only=True, frozen=True)
class EvaluationResult:
    """What an evaluation found, equal on every rank."""

    metrics: Mapping[str, float | None]
    """By name; None where no token counted."""
    samples: int
    """Samples that were evaluated, over all ranks."""
    non_loss_data: list[Any]
    """What the loss function collected, one item a microbatch, on the last pipeline stage."""


def evaluate(
    forward_step: LossAdapter,
    data_iterator: list[Iterator[Any]],
    model: list[torch.nn.Module],
    state: GlobalState,
    *,
    num_samples: int,
    pg_collection: "ProcessGroupCollection",
    reducer: MetricReducer,
    collect_non_loss_data: bool = False,
) -> EvaluationResult:
    """Run the model over `num_samples` samples without training; a collective over all ranks.

    Args:
        forward_step: The user's forward step, adapted (`bridge.training.setup`).
        data_iterator: One iterator of this rank's microbatches for each model chunk.
        model: This rank's model chunks.
        state: The run's state.
        num_samples: Samples over all ranks: a multiple of micro batch size x data-parallel size.
        pg_collection: The process groups.
        reducer: Reduces the metrics.
        collect_non_loss_data: Call the loss function for its data instead of its loss (pattern 3);
            the metrics are then empty.
    """
    train = state.cfg.train
    replica_batch = train.micro_batch_size * pg_collection.dp.size()
    if num_samples % replica_batch:
        raise ValueError(
            f"evaluate: {num_samples} samples are not a multiple of {replica_batch} (micro batch "
            "size x data-parallel size), so the ranks would not end together"
        )
    remaining = num_samples // replica_batch
    per_batch = max(1, train.global_batch_size // replica_batch)
    collected: list[Any] = []
    modes = [(module, module.training) for chunk in model for module in chunk.modules()]
    forward_step.watch.start(f"validation at step {state.train_state.step}")
    try:
        with parameters_in_sync(model), torch.no_grad():
            for chunk in model:
                chunk.eval()
            while remaining:
                outputs = run_schedule(
                    forward_step,
                    data_iterator,
                    model,
                    state,
                    num_microbatches=min(per_batch, remaining),
                    pg_collection=pg_collection,
                    forward_only=True,
                    collect_non_loss_data=collect_non_loss_data,
                )
                remaining -= min(per_batch, remaining)
                if collect_non_loss_data:
                    collected.extend(outputs)
                else:
                    reducer.accumulate(outputs)
    finally:
        # Not chunk.train(), which would wake what the user has put to sleep, such as frozen parts.
        for module, mode in modes:
            module.training = mode
    state.train_state.consumed_validation_samples += num_samples
    metrics = {} if collect_non_loss_data else reducer.reduce().to_dict()
    return EvaluationResult(metrics=metrics, samples=num_samples, non_loss_data=collected)


def run_schedule(
    forward_step: LossAdapter,
    data_iterator: list[Iterator[Any]],
    model: list[torch.nn.Module],
    state: GlobalState,
    *,
    num_microbatches: int,
    pg_collection: "ProcessGroupCollection",
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Run megatron-core's schedule for the layout over one batch.

    Returns:
        What the loss functions returned for reporting, one item a microbatch, on the last pipeline
        stage; an empty list on the others.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.utils import get_model_config

    vp_size = len(model) if len(model) > 1 else None
    schedule = get_forward_backward_func(pp_size=pg_collection.pp.size(), vp_size=vp_size)
    pipelined = pg_collection.pp.size() > 1
    outputs: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=data_iterator if vp_size else data_iterator[0],
        model=model if vp_size else model[0],
        num_microbatches=num_microbatches,
        seq_length=sequence_length(state.cfg.model),
        micro_batch_size=state.cfg.train.micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        pg_collection=pg_collection,
        p2p_communicator=(
            P2PCommunicator(pg_collection.pp, get_model_config(model[0])) if pipelined else None
        ),
    )
    return outputs


def sequence_length(model_config: Any) -> int:
    """Return the tokens of a sample; 1 for a model that has no sequences."""
    return int(getattr(model_config, "seq_length", None) or 1)
