"""Every layout trains as one process does: a sample of a matrix of layouts, models and objectives.

Every loss, the gradient norms, both kinds of evaluation and all parameters are compared. The masks
differ between samples, and some count no token. tools/layouts.py runs the complete matrix.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path

import pytest
import torch

from bridge.training.config import OptimizerConfig, SchedulerConfig
from bridge.training.gpt_step import forward_step
from campaigns import hand_back, options_of
from layout_cases import LAYOUTS, MODELS, OBJECTIVES, Case, Objective, complete, sample
from layout_runs import (
    MEASURES,
    Outcome,
    RankTrace,
    assembled,
    config_of,
    deviation,
    pieces_of,
    train_all,
)
from ranks import run_ranks
from training_runs import a_run, one_step

STEPS = 3
LAYOUT = {layout.name: layout for layout in LAYOUTS}
MODEL = {model.name: model for model in MODELS}
SUMS, MEANS = Objective(), Objective(pattern=1)
PORTING = Objective(normalization="microbatch")
PORTING_MEANS = Objective(normalization="microbatch", pattern=1)


def case_of(model: str, layout: str, objective: Objective = SUMS) -> Case:
    return Case(model=MODEL[model], layout=LAYOUT[layout], objective=objective, steps=STEPS)


def trained(outcome: Outcome) -> list[RankTrace]:
    """Return the traces of a run, which must have come to its end."""
    assert not isinstance(outcome, str), outcome
    return outcome


@pytest.fixture(scope="module")
def on_one_process() -> Callable[[Case], RankTrace]:
    """Return the trace of the same run on one process, trained on first use."""
    traces: dict[str, RankTrace] = {}

    def trace_of(case: Case) -> RankTrace:
        name = f"{case.model.name}, {case.objective}"
        if name not in traces:
            (ranks,) = map(trained, train_all([case.alone()]))
            traces[name] = ranks[0]
        return traces[name]

    return trace_of


IN_THE_SUITE = [
    ("llama", SUMS, ["1 microbatch", "8 microbatches"]),
    ("llama", SUMS, ["DP2", "TP2+SP", "PP2xVPP2", "CP2"]),
    ("llama", MEANS, ["DP2", "PP2", "CP2"]),
    ("llama", PORTING, ["DP2, no distributed optimizer", "PP2xVPP2"]),
    ("llama", PORTING_MEANS, ["CP2"]),
    ("llama", SUMS, ["CP2xDP2"]),
    ("gpt2", SUMS, ["PP2"]),
    ("recomputed", SUMS, ["PP2, 1 + 3 layers"]),
    ("mtp", SUMS, ["PP3, MTP alone"]),
    ("mtp-tied", SUMS, ["PP3, MTP alone"]),
    ("experts", SUMS, ["EP2xTP2+SP, ETP1"]),
    ("experts", PORTING, ["EP2xCP2"]),
    ("dropout-recomputed", SUMS, ["TP2"]),
    ("attention-dropout", SUMS, ["TP2+SP"]),
    ("llama-bf16", SUMS, ["DP2"]),
]


def batches() -> list[list[Case]]:
    """Return cases to train in one go: of one model, one objective and one number of ranks."""
    asked = options_of("layouts")
    if asked is None:
        return [
            [case_of(model, layout, objective) for layout in layouts]
            for model, objective, layouts in IN_THE_SUITE
        ]
    chosen = [
        case
        for case in (sample() if asked["quick"] else complete())
        if any(fnmatch(case.model.name, pattern) for pattern in asked["models"])
        and any(fnmatch(case.layout.name, pattern) for pattern in asked["layouts"])
    ]
    return [
        list(batch)
        for _, of_model in groupby(chosen, key=Case.alone)
        for _, batch in groupby(sorted(of_model, key=ranks_of), key=ranks_of)
    ]


def ranks_of(case: Case) -> int:
    return case.layout.ranks


def title_of(cases: list[Case]) -> str:
    layouts = " and ".join(case.layout.name for case in cases)
    return f"{cases[0].model.name}-{cases[0].objective}-{layouts}"


@pytest.mark.parametrize("cases", batches(), ids=title_of)
def test_a_layout_trains_as_one_process_does(
    on_one_process: Callable[[Case], RankTrace], cases: list[Case]
) -> None:
    reference = on_one_process(cases[0])
    assert len(reference.losses) == cases[0].steps
    assert reference.losses[-1] < reference.losses[0]
    wrong = []
    for case, outcome in zip(cases, train_all(cases), strict=True):
        numbers, problems = numbers_of(case, outcome, reference)
        hand_back(
            model=case.model.name,
            objective=str(case.objective),
            layout=case.layout.name,
            kind=case.layout.kind,
            ranks=case.layout.ranks,
            precision=case.model.precision,
            has_experts=case.model.has_experts,
            **numbers,
            problems=problems,
        )
        wrong += [f"{title_of([case])}: {problem}" for problem in problems]
    assert wrong == []


def numbers_of(
    case: Case, outcome: Outcome, reference: RankTrace
) -> tuple[dict[str, float | None], list[str]]:
    """Return how far a run is from the reference, and what is wrong with that."""
    if isinstance(outcome, str):
        return dict.fromkeys(MEASURES), [outcome]
    found = deviation(case, outcome, reference)
    excesses = [f"{name} is beyond its tolerance" for name in found.excesses(case.model.precision)]
    return {name: getattr(found, name) for name in MEASURES}, [*excesses, *found.faults]


PLAIN = {
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
}


@pytest.mark.parametrize(
    "layouts",
    [["1 microbatch", "8 microbatches"], ["DP2", "TP2+SP", "PP2"]],
    ids=["one rank", "two ranks"],
)
def test_an_update_is_as_long_as_the_clipping_allows(layouts: list[str]) -> None:
    """With SGD at rate 1 the update is the clipped gradient; tied embeddings count once."""

    def one_step_down(case: Case, directory: Path) -> RankTrace:
        config = config_of(case, directory)
        config.scheduler = SchedulerConfig(lr_decay_style="constant")
        config.optimizer = OptimizerConfig(
            optimizer="sgd", lr=1.0, weight_decay=0.0, sgd_momentum=0.0, clip_grad=0.5
        )
        trace = RankTrace()
        with a_run(config, forward_step) as run:
            trace.first = pieces_of(run.parts.model, run.parts.ranks.pg_collection)
            trace.grad_norms.append(float(one_step(run).grad_norm or 0.0))
            trace.last = pieces_of(run.parts.model, run.parts.ranks.pg_collection)
        return trace

    cases = [case_of("gpt2", layout) for layout in layouts]
    cases = [replace(case, layout=replace(case.layout, ddp=PLAIN)) for case in cases]
    for case, traces in zip(cases, map(trained, train_all(cases, one_step_down)), strict=True):
        assert traces[0].grad_norms[0] > 1
        first, _ = assembled([trace.first for trace in traces])
        last, faults = assembled([trace.last for trace in traces])
        assert faults == []
        squares = [float(((last[name] - first[name]).double() ** 2).sum()) for name in last]
        assert math.sqrt(sum(squares)) == pytest.approx(0.5, rel=1e-4), case.layout.name


def test_a_short_window_is_a_smaller_global_batch(tmp_path: Path) -> None:
    def step(layout: str, *, batch: int, microbatches: int | None = None) -> tuple[float, float]:
        config = config_of(case_of("llama", layout), tmp_path / f"{layout} {batch}")
        config.train.global_batch_size = batch
        with a_run(config, forward_step) as run:
            result = one_step(run, num_microbatches=microbatches, reducer=run.parts.reducer)
            return result.metrics["lm loss"] or 0.0, float(result.grad_norm or 0.0)

    def steps(windows: dict[str, int]) -> list[tuple[float, float]]:
        return [step(layout, batch=8, microbatches=n) for layout, n in windows.items()]

    (small,) = run_ranks(1, lambda: step("8 microbatches", batch=6))
    (alone,) = run_ranks(1, steps, {"8 microbatches": 6})[0]
    assert alone == pytest.approx(small, rel=1e-6)
    for found in run_ranks(2, steps, {"DP2": 3, "PP2": 6})[0]:
        assert found == pytest.approx(small, rel=1e-5)


@pytest.mark.parametrize("layout", ["DP2"])
def test_dropout_is_repeated_bit_for_bit_in_the_same_layout(layout: str) -> None:
    case = replace(case_of("dropout", layout), steps=2)
    once, again, without = map(
        trained, train_all([case, case, replace(case, model=MODEL["llama"])])
    )
    assert once[0].losses == again[0].losses
    assert once[0].losses != without[0].losses
    (one, _), (other, _) = (assembled([trace.last for trace in ranks]) for ranks in (once, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_matrix_and_its_sample_leave_nothing_out() -> None:
    combinations = {
        (model.name, objective)
        for model in MODELS
        for objective in (OBJECTIVES if model.everywhere else OBJECTIVES[:1])
    }
    for cases in (list(complete()), sample()):
        assert {case.layout.name for case in cases} == set(LAYOUT)
        assert {(case.model.name, case.objective) for case in cases} == combinations
