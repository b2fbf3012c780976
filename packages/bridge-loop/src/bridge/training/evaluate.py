"""Evaluation: the training schedule, forward only, and the same reduction as in training.

Every sample of a set counts once (`bridge.training.data.evaluation_plan`). The value of a metric is

    sum of its sums over the set / sum of its counts over the set

and depends neither on batch sizes nor on the layout. In a mean of pattern 1 a microbatch has the
weight of its samples, and so it has with train.loss_normalization=microbatch. The latter depends on
the sizes of the microbatches, as in training, and so on the layout for the samples that fill no
microbatch.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, override

import torch
import torch.distributed as dist

from bridge.training.contracts import ModelRanks
from bridge.training.data.evaluation_plan import EvaluationCall, plan_of_run
from bridge.training.loss.normalization import LossAdapter
from bridge.training.loss.reduced import ReducedMetrics
from bridge.training.loss.reducer import MetricReducer
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.ranks.collectives import largest_of_all
from bridge.training.ranks.model_ranks import to_model_ranks
from bridge.training.state import GlobalState
from bridge.training.step.pipeline_schedule import Schedule
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(kw_only=True, frozen=True)
class EvaluationResult:
    """The result of an evaluation; all but `non_loss_data` is equal on every rank."""

    metrics: Mapping[str, float | None]
    """By name; None where no token counted."""
    samples: int
    """Samples of the reduced microbatches, over all ranks, each counted once."""
    planned_samples: int
    """The argument num_samples."""
    tokens: int | None
    """Tokens in their losses, over all ranks; None if the loss function counts none (pattern 1), or
    collects data instead of a loss."""
    complete: bool
    """Whether all planned samples were evaluated; False if `stop` ended the evaluation before."""
    non_loss_data: list[Any]
    """The data that the loss function collected on this rank, one item a microbatch in the order of
    the data, on the last pipeline stage; empty on the others."""


def evaluate(  # noqa: PLR0913  # as `train_step` takes them
    forward_step: LossAdapter,
    data_iterator: list[Iterator[Any]],
    model: list[torch.nn.Module],
    state: GlobalState,
    *,
    num_samples: int,
    pg_collection: "ProcessGroupCollection | ModelRanks",
    reducer: MetricReducer,
    collect_non_loss_data: bool = False,
    stop: Callable[[], bool] | None = None,
    control_group: dist.ProcessGroup | None = None,
    name: str = "validation",
) -> EvaluationResult:
    """Run the model over `num_samples` samples without training; a collective over all ranks.

    Args:
        forward_step: The user's forward step, adapted (`bridge.training.setup`).
        data_iterator: One iterator of this rank's microbatches for each model chunk, as
            `bridge.training.data.run_data.RunData.evaluation` returns them: of
            `train.micro_batch_size` samples, where `num_samples` is a multiple of micro batch size
            x data-parallel size. Else smaller ones come last
            (`bridge.training.data.evaluation_plan.plan_of_run`).
        model: This rank's model chunks.
        state: The run's state.
        num_samples: Samples over all ranks.
        pg_collection: The process groups.
        reducer: Reduces the metrics; its accumulated metrics stay as they are.
        collect_non_loss_data: Call the loss function for its data instead of its loss (pattern 3);
            the metrics are then empty, and the state's counters stay as they are.
        stop: Called on every rank after each global batch but the last; the evaluation ends there
            if it is true on any of them.
        control_group: The ranks that agree on `stop`, over gloo; the default group if None.
        name: The name of the data in messages.

    Raises:
        UsageError: `collect_non_loss_data` would return a sample several times, as microbatches of
            this layout hold several samples.
        RuntimeError: Not every planned sample was observed, or the forward step drew some but not
            all of a rank's microbatches; on every rank.
    """
    ranks = to_model_ranks(pg_collection)
    batches = plan_of_run(state.cfg, ranks, num_samples, is_interleaved=len(model) > 1)
    if collect_non_loss_data:
        _reject_repeated_samples(batches, num_samples, ranks)
    planned = _microbatches(batches)
    iterators = [_Counted(iterator, planned) for iterator in data_iterator]
    schedule = Schedule(
        forward_step=forward_step,
        data_iterator=iterators,
        model=model,
        ranks=ranks,
        config=state.cfg,
    )
    # A fresh reducer: records of an evaluation that raises must not reach a training step.
    reducer = reducer.fresh()
    collected: list[Any] = []
    if not collect_non_loss_data:
        forward_step.watch.start(f"{name} at step {state.train_state.step}")
    done = 0
    with _evaluation_mode(model):
        for batch in batches:
            for call in batch:
                if collect_non_loss_data:
                    collected += _collect(schedule, call, reducer)
                else:
                    _evaluate(schedule, call, reducer)
            done += 1
            if stop is not None and done < len(batches) and largest_of_all(stop(), control_group):
                break
    is_complete, batches = done == len(batches), batches[:done]
    samples = sum(call.samples for batch in batches for call in batch)
    reduced = _reduce(reducer, iterators, _microbatches(batches))
    _check_observed(samples, reduced, ranks)
    if not collect_non_loss_data:
        state.train_state.consumed_validation_samples += samples
    return EvaluationResult(
        metrics=reduced.to_dict(),
        samples=samples,
        planned_samples=num_samples,
        tokens=reduced.tokens,
        complete=is_complete,
        non_loss_data=collected,
    )


def _reject_repeated_samples(
    batches: Sequence[Sequence[EvaluationCall]], num_samples: int, ranks: ModelRanks
) -> None:
    if all(call.repeats == 1 for batch in batches for call in batch):
        return
    unit = ranks.smallest_microbatch
    raise UsageError(
        f"num_samples={num_samples}: microbatches of this layout hold {unit} samples or a "
        f"multiple, and {num_samples} is none; collect from {num_samples // unit * unit} "
        "samples, or with a number of replicas that is no larger than the language model's"
    )


def _evaluate(schedule: Schedule, call: EvaluationCall, reducer: MetricReducer) -> None:
    """Run one call of the schedule, and add the records of its microbatches to the reducer."""
    records = _run(schedule, call)
    reducer.accumulate(records, weight=call.weight, repeats=call.repeats)


def _collect(schedule: Schedule, call: EvaluationCall, reducer: MetricReducer) -> list[Any]:
    """Run one call of the schedule; count its microbatches and return the data of each."""
    collected = _run(schedule, call, collect_non_loss_data=True)
    reducer.count(len(collected), weight=call.weight)
    return collected


def _run(
    schedule: Schedule, call: EvaluationCall, *, collect_non_loss_data: bool = False
) -> list[Any]:
    """Run one call of the schedule; return the results of the microbatches that count."""
    replicas = schedule.ranks.groups.dp
    counted = call.counted(replicas.rank(), replicas.size())
    with schedule.forward_step.only_first(counted):
        return schedule.run(
            call.microbatches,
            micro_batch_size=call.size,
            forward_only=True,
            collect_non_loss_data=collect_non_loss_data,
        )[:counted]


def _reduce(
    reducer: MetricReducer, iterators: Sequence["_Counted"], planned: int
) -> ReducedMetrics:
    """Reduce the metrics over all ranks, once each has drawn its planned microbatches or none.

    Raises:
        RuntimeError: A rank drew another number; on every rank.
    """
    problem = next(filter(None, (iterator.problem(planned) for iterator in iterators)), None)
    reduced = reducer.reduce(anomaly_flag=torch.tensor(float(problem is not None)))
    if reduced.has_anomaly:
        raise RuntimeError(
            f"evaluate: the forward step {problem or 'on another rank drew another number'} of the "
            f"{planned} planned microbatches; draw one with each call, or none on this rank at all"
        )
    return reduced


def _check_observed(samples: int, reduced: ReducedMetrics, ranks: ModelRanks) -> None:
    """Raise if the reduced microbatches have another number of samples than was planned."""
    # Context-parallel ranks share a microbatch, and each reports it.
    observed = reduced.samples / ranks.groups.cp.size()
    if observed != samples:
        raise RuntimeError(
            f"evaluate: {observed:g} samples were observed and {samples} planned; the ranks that "
            "the reducer reduces over are not those that the data is divided over"
        )


def _microbatches(batches: Sequence[Sequence[EvaluationCall]]) -> int:
    return sum(call.microbatches for batch in batches for call in batch)


class _Counted(Iterator[Any]):
    """An iterator that counts how many of the planned microbatches a forward step draws."""

    def __init__(self, iterator: Iterator[Any], planned: int) -> None:
        self._iterator = iterator
        self._planned = planned
        self._drawn = 0

    @override
    def __next__(self) -> Any:
        if self._drawn == self._planned:
            raise RuntimeError(
                f"evaluate: the forward step draws more than the {self._planned} planned "
                "microbatches; draw one with each call, or none on this rank at all"
            )
        try:
            item = next(self._iterator)
        except StopIteration:
            raise RuntimeError(
                f"evaluate: the data ended after {self._drawn} of {self._planned} planned "
                "microbatches; give an iterator over all of num_samples"
            ) from None
        self._drawn += 1
        return item

    def problem(self, done: int) -> str | None:
        """Return a problem if some but not all were drawn; a rank that reads nothing draws none."""
        return None if self._drawn in (0, done) else f"drew {self._drawn}"


@contextlib.contextmanager
def _evaluation_mode(model: list[torch.nn.Module]) -> Iterator[None]:
    """Put the model in eval mode, without gradients and megatron-core's timers."""
    from megatron.core.utils import get_model_config

    modes = [(module, module.training) for chunk in model for module in chunk.modules()]
    config = get_model_config(model[0])
    timers = config.timers
    try:
        with parameters_in_sync(model), torch.no_grad():
            # The timers measure steps.
            config.timers = None
            for chunk in model:
                chunk.eval()
            yield
    finally:
        config.timers = timers
        # Not chunk.train(): the user may have put modules in eval mode, such as frozen ones.
        for module, mode in modes:
            module.training = mode
