import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.training.loss.metrics import ratio
from bridge.training.loss_reduction import (
    Metric,
    MetricReducer,
    MicrobatchRecord,
    ReducedMetrics,
    as_metric,
    local,
    maximum,
    mean,
    snapshot,
    token_mean,
    total,
)
from ranks import run_ranks

CPU = torch.device("cpu")
NAN = float("nan")


def record(**metrics: Any) -> MicrobatchRecord:
    snapshots = {key: snapshot(as_metric(key, value), CPU) for key, value in metrics.items()}
    return MicrobatchRecord(metrics=snapshots, loss=torch.zeros(()), count=None)


def pair(total_: float, count: float) -> torch.Tensor:
    return torch.tensor([total_, count])


def alone(**arguments: Any) -> MetricReducer:
    defaults: dict[str, Any] = {"normalization": "token", "contributes": True, "device": CPU}
    return MetricReducer(**(defaults | arguments))


class Collectives:
    """A context that counts this process's collectives."""

    NAMES = ("all_reduce", "all_gather_object", "all_gather", "broadcast", "barrier")

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> list[str]:
        for name in self.NAMES:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(name))
        return self.calls

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return self._originals[name](*args, **kwargs)

        return call


def test_each_kind_is_reduced_over_microbatches_as_it_says() -> None:
    records = [
        record(t=pair(2, 1), m=1.0, s=total(3.0), x=maximum(torch.tensor(-7.0)), o=local(1.0)),
        record(t=pair(90, 9), m=torch.tensor(4.0), s=total(4), x=maximum(-5.0), o=local(2)),
    ]
    assert alone().reduce(records).to_dict() == {"t": 9.2, "m": 2.5, "s": 7.0, "x": -5.0, "o": 1.5}


def test_two_token_means_keep_their_own_denominators() -> None:
    records = [record(a=pair(6, 3), b=pair(8, 1)), record(a=pair(2, 1), b=pair(0, 4))]
    assert alone().reduce(records).to_dict() == {"a": 2.0, "b": 1.6}


def test_microbatch_normalization_averages_the_ratios() -> None:
    records = [record(t=pair(2, 1)), record(t=pair(90, 9))]
    assert alone(normalization="microbatch").reduce(records).to_dict() == {"t": 6.0}


def test_in_microbatch_normalization_a_microbatch_without_tokens_counts_as_a_loss_of_zero() -> None:
    reducer = alone(normalization="microbatch")
    assert reducer.reduce([record(t=pair(8, 2)), record(t=pair(0, 0))]).to_dict() == {"t": 2.0}


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
def test_a_token_mean_over_no_token_has_no_value(normalization: str) -> None:
    reducer = alone(normalization=normalization)
    values = reducer.reduce([record(t=pair(0, 0), u=pair(3, 1)), record(t=pair(0, 0))]).to_dict()
    assert values == {"t": None, "u": 3.0}


def test_keys_may_differ_between_microbatches_and_steps() -> None:
    reducer = alone()
    assert reducer.reduce([record(a=1.0), record(b=maximum(2.0)), record(a=5.0)]).to_dict() == {
        "a": 3.0,
        "b": 2.0,
    }
    assert reducer.reduce([record(a=7.0)]).to_dict() == {"a": 7.0}
    assert reducer.reduce([record(c=total(1.0))]).to_dict() == {"c": 1.0}
    assert reducer.reduce([]).to_dict() == {}


def counted(count: int | None) -> MicrobatchRecord:
    tokens = None if count is None else torch.tensor(count, dtype=torch.int32)
    return MicrobatchRecord(metrics={}, loss=torch.zeros(()), count=tokens)


def test_microbatches_and_tokens_are_counted_without_a_metric() -> None:
    reducer = alone()
    reducer.accumulate([counted(2**30), counted(2**30)])
    reduced = reducer.reduce([counted(2**30 + 1)])
    assert (reduced.microbatches, reduced.tokens, reduced.to_dict()) == (3, 3 * 2**30 + 1, {})
    assert (reducer.reduce().microbatches, reducer.reduce().tokens) == (0, None)
    zero = reducer.reduce([counted(0)])
    assert (zero.microbatches, zero.tokens) == (1, 0)
    mean_of_pattern_1 = reducer.reduce([counted(None)])
    assert (mean_of_pattern_1.microbatches, mean_of_pattern_1.tokens) == (1, None)


def test_microbatches_and_tokens_travel_with_the_metrics() -> None:
    def body() -> Any:
        rank = dist.get_rank()
        reducer = alone(contributes=rank != 1)
        reducer.reduce([record(a=1.0)]).to_dict()
        with Collectives() as calls:
            reduced = reducer.reduce([counted(3 + rank)] * (1 + rank))
            found = reduced.microbatches, reduced.tokens
        return found, calls

    # Rank 1 holds the tokens of another rank and does not contribute.
    assert run_ranks(3, body) == [((1 + 3, 3 + 3 * 5), ["all_reduce"])] * 3


def test_a_fresh_reducer_shares_no_values_with_the_first() -> None:
    reducer = alone()
    reducer.accumulate([record(a=1.0)])
    other = reducer.fresh()
    other.accumulate([record(a=5.0, b=2.0), counted(None)])
    assert reducer.reduce().to_dict() == {"a": 1.0}
    reduced = other.reduce()
    assert (reduced.to_dict(), reduced.microbatches) == ({"a": 5.0, "b": 2.0}, 2)


def test_a_fresh_reducer_shares_the_registered_keys_both_ways() -> None:
    def body() -> Any:
        reducer = alone()
        reducer.fresh().reduce([record(b=1.0)]).to_dict()
        with Collectives() as calls:
            assert reducer.reduce([record(b=2.0)]).to_dict() == {"b": 2.0}
        return calls

    assert run_ranks(2, body) == [["all_reduce"]] * 2


def test_counts_are_exact_beyond_the_integers_of_float32() -> None:
    # 2**24 + 1 has no float32; neither has the sum of these counts.
    odd = token_mean(torch.tensor(0.0), torch.tensor(2**24 + 1, dtype=torch.int64))
    records = [record(t=odd) for _ in range(3)] + [record(t=pair(3 * 2.0**24 + 4, 1))]
    assert alone().reduce(records).to_dict() == {"t": 1.0}
    assert alone().reduce([record(n=total(2**24 + 1))]).to_dict() == {"n": 2.0**24 + 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_takes_values_of_any_real_dtype_mixed(dtype: torch.dtype) -> None:
    values = alone().reduce(
        [
            record(t=torch.tensor([3, 1]).to(dtype), m=torch.tensor(1.0)),
            record(t=pair(5, 1), m=torch.tensor([3]).to(dtype)),
            record(m=2),
        ]
    )
    assert values.to_dict() == {"t": 4.0, "m": 2.0}


@pytest.mark.parametrize("kind", [mean, total, maximum, local, lambda v: token_mean(v, 1.0)])
@pytest.mark.parametrize("bad", [NAN, torch.tensor(NAN)])
def test_nan_stays_in_its_own_metric(kind: Callable[[Any], Metric], bad: Any) -> None:
    values = alone().reduce([record(x=kind(bad), y=1.0), record(x=kind(2.0), y=3.0)]).to_dict()
    assert values["x"] is not None
    assert math.isnan(values["x"])
    assert values["y"] == 2.0


@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.zeros(2, 1), "text", None, [1.0, 2.0], 1j, {"a": 1.0}]
)
def test_a_value_of_no_known_form_is_rejected_by_its_name(value: Any) -> None:
    with pytest.raises(ValueError, match="'my metric'"):
        as_metric("my metric", value)


def test_one_key_declared_in_two_ways_is_rejected_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"'x' \(mean and total\)"):
        alone().reduce([record(x=1.0), record(x=total(1.0))]).to_dict()
    reducer = alone()
    assert reducer.reduce([record(x=1.0)]).to_dict() == {"x": 1.0}
    with pytest.raises(ValueError, match=r"'x' \(mean and token_mean\)"):
        reducer.reduce([record(x=pair(1, 1))]).to_dict()


def test_accumulates_sums_over_batches_and_starts_afresh_after_a_reduction() -> None:
    reducer = alone()
    reducer.accumulate([record(t=pair(2, 1))])
    reducer.accumulate([record(t=pair(60, 5)), record(t=pair(30, 4), m=3.0)])
    assert reducer.reduce().to_dict() == {"t": 9.2, "m": 3.0}
    assert reducer.reduce([record(t=pair(1, 1))]).to_dict() == {"t": 1.0}


def test_the_result_can_be_asked_for_again_and_changed_by_nobody() -> None:
    reduced = alone().reduce([record(a=1.0)], anomaly_flag=torch.tensor(1.0))
    reduced.to_dict()["a"] = 5.0
    assert reduced.to_dict() == {"a": 1.0}
    assert reduced.has_anomaly


def test_what_happens_to_a_reported_tensor_later_does_not_matter() -> None:
    value, both = torch.tensor(3.0, dtype=torch.float64), torch.tensor([8.0, 2.0])
    taken = record(m=value, t=both)
    value.fill_(0.0)
    both.fill_(1.0)
    assert alone().reduce([taken]).to_dict() == {"m": 3.0, "t": 4.0}


def on_every_rank(
    records_of: Callable[[int], list[MicrobatchRecord]],
    contributes_of: Callable[[int], bool] = lambda rank: True,
    flag_of: Callable[[int], torch.Tensor | None] = lambda rank: None,
) -> tuple[dict[str, float | None], bool]:
    rank = dist.get_rank()
    reducer = alone(contributes=contributes_of(rank))
    reduced = reducer.reduce(records_of(rank), anomaly_flag=flag_of(rank))
    return reduced.to_dict(), reduced.has_anomaly


def test_every_rank_gets_the_same_values_over_all_ranks() -> None:
    def records_of(rank: int) -> list[MicrobatchRecord]:
        return [
            record(t=pair(rank + 0.1, rank), m=rank / 3, s=total(0.1), x=maximum(-rank - 0.5)),
            record(t=pair(1 / 3, 1), only_on_two=1 / 7) if rank == 2 else record(t=pair(0, 1)),
        ]

    results = run_ranks(3, on_every_rank, records_of)
    values, flag = results[0]
    assert all(result == results[0] for result in results)
    assert not flag
    assert values == pytest.approx(
        {"t": (0.1 + 1.1 + 2.1 + 1 / 3) / 6, "m": 1 / 3, "s": 0.3, "x": -0.5, "only_on_two": 1 / 7}
    )


def test_ranks_without_the_loss_learn_it_and_add_nothing() -> None:
    def records_of(rank: int) -> list[MicrobatchRecord]:
        # Rank 1 is another tensor-parallel rank of the last stage: it holds the same tokens.
        same = [record(t=pair(6, 2), s=total(5.0), x=maximum(-3.0))]
        return same if rank in (1, 2) else []

    results = run_ranks(3, on_every_rank, records_of, lambda rank: rank == 2)
    assert results == [({"t": 3.0, "s": 5.0, "x": -3.0}, False)] * 3


@pytest.mark.parametrize("ringing", [0, 1])
def test_an_anomaly_flag_of_one_rank_reaches_all(ringing: int) -> None:
    def flag_of(rank: int) -> torch.Tensor | None:
        return torch.tensor(float(rank == ringing)) if rank != 2 else None

    results = run_ranks(3, on_every_rank, lambda rank: [record(a=1.0)], lambda rank: True, flag_of)
    assert results == [({"a": 1.0}, True)] * 3


def test_local_values_stay_on_their_rank() -> None:
    results = run_ranks(2, on_every_rank, lambda rank: [record(o=local(float(rank)), a=1.0)])
    assert [values for values, _ in results] == [{"o": 0.0, "a": 1.0}, {"o": 1.0, "a": 1.0}]


def test_a_rank_that_reports_no_local_value_has_that_of_the_first_rank_that_does() -> None:
    def records_of(rank: int) -> list[MicrobatchRecord]:
        if rank == 0:  # an earlier pipeline stage: it writes the log and has no loss
            return []
        late = record(late=local(0.5)) if rank == 2 else record()
        return [record(o=local(1.0 * rank)), record(a=1.0), record(o=local(3.0 * rank)), late]

    # Rank 1 is a tensor-parallel rank whose other metrics do not count: this one it keeps.
    results = run_ranks(4, on_every_rank, records_of, lambda rank: rank != 1)
    found = [values for values, _ in results]
    assert [values["o"] for values in found] == [2.0, 2.0, 4.0, 6.0]
    assert [values["late"] for values in found] == [0.5] * 4
    assert [values["a"] for values in found] == [1.0] * 4


def test_a_local_value_that_is_not_a_number_stays_on_its_rank() -> None:
    results = run_ranks(3, on_every_rank, lambda rank: [record(o=local([NAN, -0.5, 7.0][rank]))])
    first, second, third = (values["o"] for values, _ in results)
    assert first is not None
    assert math.isnan(first)
    assert (second, third) == (-0.5, 7.0)


def test_a_nan_on_one_rank_is_reported_on_all() -> None:
    def records_of(rank: int) -> list[MicrobatchRecord]:
        bad = NAN if rank == 1 else 1.0
        return [record(x=maximum(bad), m=bad, fine=maximum(1.0))]

    for values, _ in run_ranks(2, on_every_rank, records_of):
        assert math.isnan(values["x"] or 0.0)
        assert math.isnan(values["m"] or 0.0)
        assert values["fine"] == 1.0


def _error_on_every_rank(records_of: Callable[[int], list[MicrobatchRecord]]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        on_every_rank(records_of)
    return str(caught.value)


def test_a_key_declared_differently_on_two_ranks_is_rejected_on_both() -> None:
    def records_of(rank: int) -> list[MicrobatchRecord]:
        return [record(x=1.0 if rank else total(1.0))]

    for message in run_ranks(2, _error_on_every_rank, records_of):
        assert "'x' (total and mean)" in message


def test_a_conflict_within_one_rank_is_rejected_on_all() -> None:
    def records_of(rank: int) -> list[MicrobatchRecord]:
        return [record(x=1.0), record(x=total(1.0))] if rank else [record(x=1.0)]

    for message in run_ranks(2, _error_on_every_rank, records_of):
        assert "'x' (mean and total)" in message


def test_loss_patterns_that_differ_between_ranks_are_rejected_on_all() -> None:
    def records_of(rank: int) -> list[MicrobatchRecord]:
        count = torch.tensor(1) if rank else None
        one = MicrobatchRecord(metrics={"x": mean(1.0)}, loss=torch.zeros(()), count=count)
        return [one]

    for message in run_ranks(2, _error_on_every_rank, records_of):
        assert "on different ranks" in message


def _counted_steps() -> tuple[list[list[str]], list[dict[str, float | None]]]:
    """Steps with the first key, the same again, a new key on one rank, and the union again."""
    rank = dist.get_rank()
    reducer = alone(contributes=rank > 0)
    counts, values = [], []
    for extra in ([], [], [1], [], [1, 2]):
        more = {"extra": maximum(float(rank))} if rank in extra else {}
        with Collectives() as calls:
            reduced = reducer.reduce([record(t=pair(4, 2), m=1.0, o=local(rank), **more)])
            values.append(reduced.to_dict())
        counts.append(calls)
    return counts, values


def test_one_collective_carries_a_step_and_an_exchange_a_new_key() -> None:
    exchange = ["all_reduce", "all_gather_object", "all_reduce"]
    for rank, (counts, values) in enumerate(run_ranks(3, _counted_steps)):
        base = {"t": 2.0, "m": 1.0, "o": rank}
        assert counts == [exchange, ["all_reduce"], exchange, ["all_reduce"], ["all_reduce"]]
        assert values == [base, base, base | {"extra": 1.0}, base, base | {"extra": 2.0}]


def _outstanding() -> list[dict[str, float | None]]:
    rank = dist.get_rank()
    reducer = alone()
    results: list[ReducedMetrics] = [
        reducer.reduce([record(a=1.0)]),
        reducer.reduce([record(**({"b": 2.0} if rank else {"a": 3.0}))]),
        reducer.reduce([record(a=5.0)]),
    ]
    return [reduced.to_dict() for reduced in results]


def test_results_may_be_read_later_in_order() -> None:
    expected = [{"a": 1.0}, {"a": 3.0, "b": 2.0}, {"a": 5.0}]
    assert run_ranks(2, _outstanding) == [expected] * 2


def _context_parallel_ratios() -> tuple[list[list[str]], list[dict[str, float | None]]]:
    """Two data-parallel replicas of two context-parallel ranks, two microbatches (case D)."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    cells = [
        [(6, 2), (9, 1)],
        [(4, 4), (0, 0)],
        [(10, 5), (0, 0)],
        [(3, 3), (0, 0)],
    ]
    reducer = alone(
        normalization="microbatch",
        context_parallel_size=2,
        context_parallel_group=groups[rank // 2],
    )
    counts, values = [], []
    for _ in range(2):
        records = [record(t=pair(*cell), m=float(rank)) for cell in cells[rank]]
        if rank == 3:
            records[1] = record(m=3.0)  # a shard may leave the key out
        with Collectives() as calls:
            values.append(reducer.reduce(records).to_dict())
        counts.append(calls)
    return counts, values


def test_microbatch_normalization_adds_a_microbatchs_shards_before_it_divides() -> None:
    expected = {"t": pytest.approx((10 / 6 + 9 + 13 / 8 + 0) / 4), "m": 1.5}
    for counts, values in run_ranks(4, _context_parallel_ratios):
        assert values == [expected, expected]
        assert counts[1] == ["all_reduce", "all_reduce"]


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
def test_every_rank_contributes_to_a_metric_of_all_ranks(normalization: Any) -> None:
    def body() -> tuple[list[str], dict[str, float | None]]:
        last = dist.get_rank() == 1
        reducer = alone(normalization=normalization, contributes=last)
        ours = {"r": ratio(torch.tensor(1.0 + dist.get_rank()), 4.0), "none": ratio(0.0, 0.0)}
        if last:
            ours["own"] = ratio(6.0, 4.0)
        reducer.add_step([record(m=2.0)], of_all_ranks=ours)
        reducer.reduce().to_dict()
        reducer.add_step([record(m=2.0)], of_all_ranks=ours)
        with Collectives() as calls:
            values = reducer.reduce().to_dict()
        return calls, values

    # (1 + 2) / (4 + 4), also where token means are means of ratios.
    wanted = {"m": 2.0, "r": 0.375, "none": None, "own": 1.5}
    assert run_ranks(2, body) == [(["all_reduce"], wanted)] * 2


STEPS = 5
"""Of an interval, of which step 1 is skipped."""


def a_cell(rank: int, step: int, microbatch: int) -> tuple[float, int]:
    """Return the sum and the count of a microbatch: step 3 has no token anywhere."""
    count = 0 if step == 3 else (3 * rank + 2 * step + microbatch) % 4
    return count * (1.0 + rank + 10 * step + microbatch**2), count


def an_interval(normalization: Any, average: Any = "interval") -> tuple[Any, Any, list[str], int]:
    """Reduce five steps of two microbatches at once, on three ranks, and then one step alone."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    reducer = alone(
        normalization=normalization,
        average=average,
        context_parallel_size=2 if rank < 2 else 1,
        context_parallel_group=groups[rank // 2],
    )
    found = []
    for _ in range(2):
        for step in range(STEPS):
            records = []
            for microbatch in range(2):
                value, count = a_cell(rank, step, microbatch)
                metrics = {"t": pair(value, count), "n": total(count), "x": maximum(value)}
                if step == 4 and rank != 1:
                    metrics["late"] = token_mean(4.0, 2)
                metrics["m"] = mean(float("nan") if step == 1 else step + rank)
                metrics["o"] = local(float(rank + step))
                records.append(replace(record(**metrics), count=torch.tensor(count)))
            shared = {"r": ratio(1.0 + rank + step, 2.0)} if step != 2 else {}
            reducer.add_step(records, of_all_ranks=shared, is_skipped=step == 1)
        with Collectives() as calls:
            reduced = reducer.reduce()
            found.append(reduced.to_dict())
    tokens = reduced.tokens
    assert tokens is not None
    reducer.add_step([record(t=pair(3, 1), m=NAN)], is_skipped=True)
    return found, reducer.reduce().to_dict(), calls, tokens


def values_of_steps(normalization: str) -> dict[int, float]:
    """Return each step's token mean, written out; none for a step without tokens."""
    values = {}
    for step in (0, 2, 3, 4):
        cells = [[a_cell(rank, step, m) for m in range(2)] for rank in range(3)]
        if not any(count for rank in cells for _, count in rank):
            continue
        if normalization == "token":
            flat = [cell for rank in cells for cell in rank]
            values[step] = sum(value for value, _ in flat) / sum(count for _, count in flat)
            continue
        ratios = []
        for microbatch in range(2):
            for ranks in ((0, 1), (2,)):  # context-parallel ranks share a microbatch
                value, count = map(sum, zip(*(cells[r][microbatch] for r in ranks), strict=True))
                ratios += [value / (count or 1)] * len(ranks)
        values[step] = sum(ratios) / len(ratios)
    return values


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
def test_an_interval_is_the_mean_of_its_steps_in_one_collective(normalization: str) -> None:
    by_step = values_of_steps(normalization)
    assert sorted(by_step) == [0, 2, 4]
    cells = {step: [a_cell(r, step, m) for r in range(3) for m in range(2)] for step in range(5)}
    del cells[1]
    wanted = {
        "t": pytest.approx(sum(by_step.values()) / 3, rel=1e-15),
        "n": sum(count for step in cells.values() for _, count in step),
        "x": max(value for step in cells.values() for value, _ in step),
        "late": 2.0,
        "m": pytest.approx((0 + 2 + 3 + 4) / 4 + 1),
        "r": pytest.approx(((6 + 15 + 18) / 6) / 3),
    }
    tokens = sum(a_cell(r, s, m)[1] for r in range(3) for s in range(STEPS) for m in range(2))
    for rank, (found, alone_, calls, counted_) in enumerate(
        run_ranks(3, an_interval, normalization)
    ):
        assert found == [wanted | {"o": 9 / 4 + rank}] * 2
        shares_microbatches = normalization == "microbatch" and rank < 2
        assert calls == ["all_reduce"] * (2 if shares_microbatches else 1)
        assert counted_ == tokens  # of the skipped step too
        # A step that is reduced alone is reported, skipped or not.
        assert alone_["t"] == 3.0
        assert math.isnan(alone_["m"])


def test_without_an_average_a_logged_step_has_its_own_values_and_all_tokens_are_counted() -> None:
    ((found, _, _, tokens),) = run_ranks(1, _alone_of_an_interval)
    sums = [a_cell(0, 4, microbatch) for microbatch in range(2)]
    assert found[1]["t"] == sum(value for value, _ in sums) / sum(count for _, count in sums)
    assert found[1]["m"] == 4.0
    assert tokens == sum(a_cell(0, step, m)[1] for step in range(STEPS) for m in range(2))


def _alone_of_an_interval() -> tuple[Any, Any, list[str], int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", lambda ranks: None)
        return an_interval("token", "step")


def test_a_long_interval_keeps_few_tensors_and_its_exact_value() -> None:
    reducer = alone()
    for step in range(600):
        reducer.add_step([replace(record(t=pair(step, 1 + step % 2)), count=torch.tensor(1))])
    (group,) = reducer._taken.groups
    assert len(group._values) < 256 > len(reducer._counts)
    reduced = reducer.reduce()
    exact = sum(step / (1 + step % 2) for step in range(600)) / 600
    assert reduced.to_dict() == {"t": pytest.approx(exact, rel=1e-14)}
    assert reduced.tokens == 600


def test_tokens_can_be_taken_between_two_reductions() -> None:
    def body() -> list[int | None]:
        reducer = alone(contributes=dist.get_rank() > 0)
        reducer.add_step([counted(3 + dist.get_rank())])
        taken = reducer.take_tokens()
        reducer.add_step([counted(5)])
        return [taken, reducer.reduce().tokens, reducer.take_tokens()]

    assert run_ranks(2, body) == [[4, 5, None]] * 2
