"""The microbatches of an evaluation: every sample once, whatever the sizes and the layout."""

import itertools
from collections import Counter

import pytest

from bridge.training.batch_sizes import BatchSizes
from bridge.training.contracts import DataShard
from bridge.training.data.evaluation_plan import EvaluationCall, plan_evaluation

SIZES = list(itertools.product([1, 2, 3], [1, 2, 4], [1, 2, 6], [1, 2]))
"""Replicas, microbatches of a group, samples of a microbatch, smallest microbatch."""


def plans(num_samples: int) -> list[tuple[tuple[int, ...], list[list[EvaluationCall]]]]:
    return [
        (
            sizes,
            plan_evaluation(
                num_samples,
                BatchSizes(
                    global_batch=2 * replicas * group * micro, micro_batch=micro, replicas=replicas
                ),
                group=group,
                smallest=smallest,
            ),
        )
        for sizes in SIZES
        for replicas, group, micro, smallest in [sizes]
        if micro % smallest == 0
    ]


@pytest.mark.parametrize("num_samples", [1, 2, 5, 13, 47, 48, 156])
def test_every_sample_counts_once_and_a_microbatch_counts_whole_or_not(num_samples: int) -> None:
    for (replicas, group, micro, smallest), batches in plans(num_samples):
        seen: Counter[int] = Counter()
        for call in itertools.chain.from_iterable(batches):
            assert call.microbatches % group == 0
            assert smallest <= call.size <= micro
            assert call.size % smallest == 0
            for replica in range(replicas):
                share = DataShard(rank=replica, size=replicas, samples=call.size)
                drawn = list(call.positions(share))
                assert len(drawn) == call.microbatches
                for positions in drawn[: call.counted(replica, replicas)]:
                    of_each = Counter(positions)
                    assert set(of_each.values()) == {call.repeats}
                    assert len(of_each) == call.weight
                    seen.update(of_each.keys())
                # A repeated sample is one of the evaluation.
                assert {p for positions in drawn for p in positions} <= set(range(num_samples))
        assert seen == Counter(range(num_samples))


@pytest.mark.parametrize("num_samples", [0, 7, 30, 100, 156])
def test_whole_batches_are_those_of_training_and_a_last_one_takes_three_calls_more(
    num_samples: int,
) -> None:
    for (replicas, group, micro, smallest), batches in plans(num_samples):
        whole, part = divmod(num_samples, 2 * replicas * group * micro)
        assert len(batches) == whole + (part > 0)
        for [call] in batches[:whole]:
            assert (call.size, call.microbatches, call.repeats) == (micro, 2 * group, 1)
        for calls in batches[whole:]:
            assert len(calls) <= 3 + (smallest > 1)
            assert sum(call.microbatches for call in calls[1:]) <= group * (2 + smallest)


def test_parts_of_a_microbatch_read_the_samples_of_the_whole() -> None:
    """Two encoders for one language model: its microbatches cannot hold one sample alone."""
    [[*_, last]] = plan_evaluation(
        7, BatchSizes(global_batch=8, micro_batch=4, replicas=1), smallest=2
    )
    assert (last.first, last.samples, last.size, last.repeats) == (6, 1, 2, 2)
    for rank in (0, 1):
        assert list(last.positions(DataShard(rank=rank, size=2, samples=1))) == [[6]]
