"""Every layout draws the same samples at the same step, and a position resumes exactly."""

import itertools

import pytest

from bridge.training.contracts import DataSplits
from bridge.training.data_loading import (
    MicrobatchSampler,
    SampleOrder,
    as_splits,
    evaluation_samples,
)


def drawn(
    data_parallel_size: int, start: int, microbatches: int, order: SampleOrder
) -> list[list[list[int]]]:
    """Return the microbatches that each data-parallel rank draws from a position on."""
    return [
        list(
            itertools.islice(
                MicrobatchSampler(
                    order,
                    start=start,
                    stop=None,
                    micro_batch_size=2,
                    data_parallel_rank=rank,
                    data_parallel_size=data_parallel_size,
                ),
                microbatches,
            )
        )
        for rank in range(data_parallel_size)
    ]


def test_data_parallel_ranks_draw_the_microbatches_that_one_rank_draws() -> None:
    order = SampleOrder(40, shuffle=True, seed=3)
    [alone] = drawn(1, 0, 8, order)
    first, second = drawn(2, 0, 4, order)
    assert [*itertools.chain(*zip(first, second, strict=True))] == alone


def test_an_epoch_visits_every_sample_once_and_the_next_in_another_order() -> None:
    order = SampleOrder(7, shuffle=True, seed=0)
    first, second = [order[i] for i in range(7)], [order[i] for i in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


@pytest.mark.parametrize("consumed", [0, 4, 12, 36, 40, 44])
def test_drawing_from_a_position_continues_the_order_across_epochs(consumed: int) -> None:
    order = SampleOrder(20, shuffle=True, seed=5)
    [whole] = drawn(1, 0, 40, order)
    [rest] = drawn(1, consumed, 10, SampleOrder(20, shuffle=True, seed=5))
    assert rest == whole[consumed // 2 : consumed // 2 + 10]


def test_a_dataset_that_shuffled_already_is_drawn_in_its_order() -> None:
    order = SampleOrder(3, shuffle=False, seed=9)
    assert [order[i] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_orders_that_differ_have_other_fingerprints() -> None:
    prints = {
        SampleOrder(size, shuffle=shuffle, seed=seed).fingerprint
        for size, shuffle, seed in [(5, True, 1), (6, True, 1), (5, True, 2), (5, False, 1)]
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("size", "replica_batch_size", "eval_iters", "expected"),
    [
        (100, 4, None, 96),
        (100, 8, None, 96),
        (100, 4, 2, 32),
        (100, 4, 50, 96),
        (10, 4, None, 8),
        (10, 4, 0, 0),
    ],
)
def test_an_evaluation_takes_whole_global_batches(
    size: int, replica_batch_size: int, eval_iters: int | None, expected: int
) -> None:
    samples = evaluation_samples(
        size,
        global_batch_size=16,
        replica_batch_size=replica_batch_size,
        eval_iters=eval_iters,
    )
    assert samples == expected


def test_a_validation_set_that_cannot_fill_a_microbatch_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"3 samples.*train\.micro_batch_size"):
        evaluation_samples(3, global_batch_size=16, replica_batch_size=4, eval_iters=None)


def test_a_sequence_of_datasets_is_train_validation_and_test() -> None:
    splits = as_splits([[1], [2]])
    assert (splits.train, splits.validation, splits.test) == ([1], [2], None)
    assert as_splits(kept := DataSplits(train=[1])) is kept
    with pytest.raises(ValueError, match="DataSplits"):
        as_splits(7)  # type: ignore[arg-type]
