"""Training runs on some ranks: their losses and parameters, and the deviation between two runs."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from bridge.training.config import (
    ConfigContainer,
    DistributedDataParallelConfig,
    MixedPrecisionConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
)
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.gpt_step import forward_step
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.model.initial_weights import shards_of_parameters
from bridge.training.run import Run
from bridge.training.train import train
from layout_cases import GLOBAL_BATCH, MICRO_BATCH, Case
from ranks import RankFailure, run_ranks
from training_runs import a_run, gpt_run

VALIDATION = 16


@dataclass(kw_only=True)
class UnevenData:
    """Tokens that mostly follow a rule; masks differ between samples, and some are empty."""

    train: int = 48
    validation: int = VALIDATION

    def build(self, request: DataRequest) -> DataSplits:
        model: Any = request.config.model
        return DataSplits(
            train=UnevenSamples(self.train, 0, model),
            validation=UnevenSamples(self.validation, 1000, model),
        )


class UnevenSamples:
    """Samples of `UnevenData`: a function of their index."""

    def __init__(self, size: int, first: int, model: Any) -> None:
        self.size, self.first = size, first
        self.length, self.vocabulary = model.seq_length, model.vocab_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.first + index)
        text = [int(torch.randint(self.vocabulary, (), generator=generator))]
        for surprise in torch.rand(self.length, generator=generator).tolist():
            noise = int(torch.randint(self.vocabulary, (), generator=generator))
            text.append(noise if surprise < 0.2 else (3 * text[-1] + 1) % self.vocabulary)
        positions = torch.arange(self.length)
        masks = (
            positions >= 0,
            positions >= self.length * 3 // 4,  # an answer behind a long prompt
            positions < 0,
            torch.rand(self.length, generator=generator) < 0.4,
            positions == self.length // 3,
            positions < self.length * 2 // 3,
        )
        return {
            "tokens": torch.tensor(text[:-1]),
            "labels": torch.tensor(text[1:]),
            "loss_mask": masks[index % len(masks)].float(),
            "position_ids": positions,
        }


def mean_step(
    state: Any, data_iterator: Iterator[Any], model: Any
) -> tuple[Any, Callable[..., Any]]:
    """Pattern 1 of the loss: the mean over a microbatch's own tokens."""
    output, sums = forward_step(state, data_iterator, model)
    group = parallel_state.get_context_parallel_group()

    def loss_function(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, count, _ = sums(output)
        # Pattern 1 is averaged over the ranks of the group, each of which holds a shard.
        dist.all_reduce(count, group=group)
        mean = total * group.size() / count.clamp(min=1)
        return mean, {"lm loss": mean.detach()}

    return output, loss_function


FORWARD_STEPS: dict[int, Callable[..., Any]] = {1: mean_step, 2: forward_step}
"""The forward step of each pattern of loss function."""


def config_of(case: Case, directory: Path) -> ConfigContainer:
    """Return the configuration of a case."""
    return gpt_run(
        directory,
        case.model_config(),
        dataset=UnevenData(),
        train=TrainConfig(
            train_iters=case.steps,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=case.micro_batch_size,
            loss_normalization=case.objective.normalization,
        ),
        optimizer=OptimizerConfig(
            lr=5e-3, min_lr=5e-4, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0
        ),
        scheduler=SchedulerConfig(lr_warmup_fraction=0.2),
        mixed_precision=MixedPrecisionConfig(precision=case.model.precision),
        ddp=DistributedDataParallelConfig(
            **{
                "grad_reduce_in_fp32": True,
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            }
            | dict(case.layout.ddp)
        ),
    )


@dataclass(frozen=True)
class Piece:
    """A rank's shard of a parameter, and its position in the unsharded one."""

    shape: tuple[int, ...]
    place: tuple[int | slice, ...]
    values: torch.Tensor


@dataclass(kw_only=True)
class RankTrace:
    """Losses, norms and parameters of a run on one rank."""

    losses: list[float] = field(default_factory=list)
    other_losses: dict[str, list[float]] = field(default_factory=dict)
    """Auxiliary losses by name: of experts and of MTP layers."""
    grad_norms: list[float] = field(default_factory=list)
    validation: float = float("nan")
    collected: list[float] = field(default_factory=list)
    """Pattern 3: the loss that each of this rank's microbatches of the evaluation returned."""
    replica: tuple[int, int] = (0, 0)
    """The data-parallel rank and size."""
    first: dict[str, list[Piece]] = field(default_factory=dict)
    """The parameters before the first step."""
    last: dict[str, list[Piece]] = field(default_factory=dict)
    """The parameters after the last step."""

    def on_train_start(self, context: Any) -> None:
        self.first = pieces_of(context.model, context.pg_collection)

    def on_log(self, context: Any, row: dict[str, Any]) -> None:
        self.losses.append(row["lm loss"])
        for name in row:
            if name.endswith("loss") and name != "lm loss":
                self.other_losses.setdefault(name, []).append(row[name])
        self.grad_norms.append(row["grad_norm"])


def pieces_of(model: list[Any], pg_collection: Any) -> dict[str, list[Piece]]:
    """Copy this rank's parameters, under the names that they have in every layout."""
    pieces: dict[str, list[Piece]] = {}
    with parameters_in_sync(model):
        for chunk in model:
            for _, shards in shards_of_parameters(unwrap_model(chunk), pg_collection):
                for shard in shards:
                    assert shard.data is not None
                    pieces.setdefault(shard.key, []).append(
                        Piece(
                            shard.global_shape,
                            shard.global_slice(),
                            shard.data.detach().float().clone(),
                        )
                    )
    return pieces


def train_on_this_rank(case: Case, directory: Path) -> RankTrace:
    """Train a case; every rank calls it."""
    return traced(config_of(case, directory), case.objective.pattern)


def traced(config: ConfigContainer, pattern: int) -> RankTrace:
    """Train, evaluate, and collect what the loss function returns in an evaluation."""
    trace = RankTrace()
    with a_run(config, FORWARD_STEPS[pattern], [trace]) as run:
        with run.callbacks.training(run.context):
            train(run)
        run.validate()
        trace.validation = run.evaluations.validation["lm loss"] or 0.0
        trace.collected = _collected(run, pattern)
        groups = run.parts.ranks.model.groups
        trace.replica = (groups.dp.rank(), groups.dp.size())
        trace.last = pieces_of(run.parts.model, groups)
    return trace


def _collected(run: Run, pattern: int) -> list[float]:
    collected = run.context.collect_non_loss_data()
    groups = run.parts.ranks.model.groups
    if groups.tp.rank() > 0:
        return []
    # Ranks that share a microbatch return parts of a sum, or means that are averaged.
    shares = groups.cp.size() if pattern == 1 else 1
    return [float(item[0]) / shares for item in collected]


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """The deviation of a run from the same one on one process: the worst of all steps.

    Relative, but for the parameters: the largest difference of any parameter after the last step,
    as a part of the largest change of any parameter during training.
    """

    loss: float
    grad_norm: float
    evaluation: float
    parameters: float
    faults: tuple[str, ...] = ()
    """Exact conditions that do not hold."""

    def excesses(self, precision: str) -> list[str]:
        """Return the names of the measures beyond their tolerance; NaN is beyond."""
        allowed = TOLERANCES[precision]
        return [name for name in MEASURES if not getattr(self, name) <= getattr(allowed, name)]


MEASURES = ("loss", "grad_norm", "evaluation", "parameters")
TOLERANCES = {
    "fp32": Deviation(loss=1e-5, grad_norm=1e-4, evaluation=1e-5, parameters=1e-3),
    "bf16": Deviation(loss=2e-3, grad_norm=3e-2, evaluation=2e-3, parameters=0.5),
}


type Outcome = list[RankTrace] | str
"""The traces of a run's ranks, or the reason why it failed."""


def train_all(
    cases: Sequence[Case], train_one: Callable[[Case, Path], RankTrace] = train_on_this_rank
) -> list[Outcome]:
    """Train cases of one number of ranks.

    One family of forked ranks trains all of them, one after the other, unless one fails.
    """
    ranks = cases[0].layout.ranks

    def on_a_rank(directory: Path) -> list[RankTrace]:
        return [train_one(case, directory / f"{number}") for number, case in enumerate(cases)]

    with tempfile.TemporaryDirectory(prefix="layouts-") as directory:
        try:
            traces = run_ranks(ranks, on_a_rank, Path(directory), timeout=120 * len(cases))
        except RankFailure as failure:
            if len(cases) == 1:
                return [str(failure)]
            return [outcome for case in cases for outcome in train_all([case], train_one)]
    return [list(of_case) for of_case in zip(*traces, strict=True)]


def deviation(case: Case, traces: Sequence[RankTrace], reference: RankTrace) -> Deviation:
    """Compare the ranks of a run with the one rank of the same run alone."""
    faults = []
    for name in ("losses", "other_losses", "grad_norms", "validation"):
        if any(getattr(trace, name) != getattr(traces[0], name) for trace in traces):
            faults.append(f"ranks disagree on their {name}")
    first, first_faults = assembled([trace.first for trace in traces])
    last, last_faults = assembled([trace.last for trace in traces])
    wanted_first, _ = assembled([reference.first])
    wanted_last, _ = assembled([reference.last])
    faults += first_faults + last_faults
    if not _equal(first, wanted_first):
        faults.append("the initial weights are others")
    if traces[0].other_losses.keys() != reference.other_losses.keys():
        faults.append("other losses are logged")
    samples = max(case.micro_batch_size, MICRO_BATCH)
    change = worst(_distance(wanted_last[name], wanted_first[name]) for name in wanted_last)
    collected = _relative_to_largest(
        _collected_of_all(traces, samples // case.micro_batch_size),
        _collected_of_all([reference], samples // MICRO_BATCH),
    )
    return Deviation(
        loss=worst(
            [
                _relative(traces[0].losses, reference.losses),
                *(
                    _relative(values, reference.other_losses[name])
                    for name, values in traces[0].other_losses.items()
                    if name in reference.other_losses
                ),
            ]
        ),
        grad_norm=_relative(traces[0].grad_norms, reference.grad_norms),
        evaluation=worst([_relative([traces[0].validation], [reference.validation]), collected]),
        parameters=worst(
            _distance(last[name], wanted) / change if name in last else float("inf")
            for name, wanted in wanted_last.items()
        ),
        faults=tuple(faults),
    )


def assembled(
    of_ranks: Sequence[dict[str, list[Piece]]],
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Put the ranks' shards together; return the faults too.

    Every element must be present, and equal on all ranks that have it.
    """
    whole: dict[str, torch.Tensor] = {}
    faults = set()
    for pieces in of_ranks:
        for name, parts in pieces.items():
            for part in parts:
                full = whole.setdefault(name, torch.full(part.shape, float("nan")))
                present = full[part.place]
                if not torch.where(present.isnan(), part.values, present).equal(part.values):
                    faults.add(f"replicas of {name} differ")
                full[part.place] = part.values
    faults |= {f"a part of {name} is nowhere" for name, full in whole.items() if full.isnan().any()}
    return whole, sorted(faults)


def _collected_of_all(traces: Sequence[RankTrace], group: int) -> list[float]:
    """Return the collected losses of all microbatches in order, summed in groups of `group`."""
    losses: dict[int, float] = {}
    for trace in traces:
        rank, ranks = trace.replica
        for index, loss in enumerate(trace.collected):
            losses[index * ranks + rank] = losses.get(index * ranks + rank, 0.0) + loss
    ordered = [losses[microbatch] for microbatch in sorted(losses)]
    return [sum(ordered[start : start + group]) for start in range(0, len(ordered), group)]


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _relative(values: Sequence[float], wanted: Sequence[float]) -> float:
    return worst(abs(v - w) / abs(w) for v, w in zip(values, wanted, strict=True))


def _relative_to_largest(values: Sequence[float], wanted: Sequence[float]) -> float:
    largest = worst(map(abs, wanted))
    return worst(abs(v - w) / largest for v, w in zip(values, wanted, strict=True))


def worst(deviations: Iterable[float]) -> float:
    """Return the largest deviation; NaN if there is one, which Python's max may skip."""
    return float(torch.tensor(list(deviations), dtype=torch.float64).max())
