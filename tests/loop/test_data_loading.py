"""The order of samples: the same under every layout, and continued exactly from any position."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from bridge.training.config import ValidationConfig
from bridge.training.contracts import DataShard, DataSplits, named_sets
from bridge.training.data.sample_order import MicrobatchSampler, SampleOrder
from bridge.training.data.splits import as_splits
from bridge.training.pretrain import pretrain
from plain_torch import plain_torch
from ranks import run_ranks
from training_runs import OwnData, a_run, own_run, series, token_step
from validation_sets import FIRST, NamedData, SizesOfRanks, error_of


def drawn(
    data_parallel_size: int, start: int, microbatches: int, order: SampleOrder
) -> list[list[list[int]]]:
    """Return the microbatches that each data-parallel rank draws, starting at a position."""
    return [
        list(
            itertools.islice(
                MicrobatchSampler(
                    order,
                    DataShard(rank=rank, size=data_parallel_size, samples=2),
                    start=start,
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


def test_a_sequence_of_datasets_is_train_validation_and_test() -> None:
    splits = as_splits([[1], [2]])
    assert (splits.train, splits.validation, splits.test) == ([1], [2], None)
    assert as_splits(kept := DataSplits(train=[1])) is kept
    with pytest.raises(ValueError, match="DataSplits"):
        as_splits(7)  # type: ignore[arg-type]


def test_one_set_has_the_name_of_its_split_and_several_have_their_own() -> None:
    assert named_sets("validation", [1]) == {"validation": [1]}
    sets = {"wiki": [1], "code": [2]}
    assert named_sets("test", sets) == {"test/wiki": [1], "test/code": [2]}
    assert named_sets("validation", {"wiki": [1]}) == {"validation/wiki": [1]}
    assert named_sets("validation", None) == named_sets("validation", []) == {}
    assert named_sets("validation", {}) == {}


@pytest.mark.parametrize("name", ["", " ", "a/b", "/", 3])
def test_a_set_is_not_named_by_nothing_or_with_a_slash(name: Any) -> None:
    with pytest.raises(ValueError, match=f"validation data: the name {name!r} of a set"):
        named_sets("validation", {name: [1]})


def test_a_wrong_name_and_an_empty_set_are_found_at_the_start(tmp_path: Path) -> None:
    def body() -> None:
        data = NamedData(validation={"a/b": 8})
        with (
            pytest.raises(ValueError, match="the name 'a/b' of a set"),
            a_run(own_run(tmp_path / "slash", dataset=data), token_step),
        ):
            pass
        data = NamedData(validation={"wiki": 8, "code": 0})
        with (
            pytest.raises(ValueError, match="validation/code data: it has no samples"),
            a_run(own_run(tmp_path / "empty", dataset=data), token_step),
        ):
            pass

    run_ranks(1, body, timeout=120)


def test_the_start_says_how_many_samples_are_evaluated_of_how_many(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body(name: str, data: Any, eval_iters: int | None = None) -> None:
        config = own_run(tmp_path / name, dataset=data)
        config.train.train_iters = 1
        config.validation = ValidationConfig(eval_iters=eval_iters)
        pretrain(config, token_step)

    run_ranks(2, body, "one", OwnData(validation=27, test=8), timeout=120)
    assert "evaluates validation 27 of 27, test 8 of 8 samples\n" in capfd.readouterr().out
    named = NamedData(validation={"wiki": 24, "code": 7})
    run_ranks(2, body, "named", named, timeout=120)
    expected = "evaluates validation/wiki 24 of 24, validation/code 7 of 7 samples\n"
    assert expected in capfd.readouterr().out
    run_ranks(1, body, "part", named, 1, timeout=120)
    expected = "evaluates validation/wiki 8 of 24, validation/code 7 of 7 samples\n"
    assert expected in capfd.readouterr().out
    run_ranks(1, body, "off", named, 0, timeout=120)
    assert "evaluates" not in capfd.readouterr().out
    assert series(tmp_path / "part", "validation/wiki/error") != []
    assert series(tmp_path / "off", "validation/wiki/error") == []


def test_an_evaluation_at_the_start_without_validation_data_is_said_to_have_no_effect(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=0))
        config.validation = ValidationConfig(eval_at_start=True)
        pretrain(config, token_step)

    run_ranks(1, body)
    assert "warning: validation.eval_at_start=true: has no effect" in capfd.readouterr().out


def test_the_smallest_size_of_a_set_counts_on_every_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of the smaller size: with its own size a rank would draw other samples."""

    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=SizesOfRanks(train=(40, 24), validation=(9, 17)))
        config.train.train_iters, config.train.epochs = None, 2
        config.validation = ValidationConfig(eval_at_start=True)
        result = pretrain(config, token_step)
        return result.step, result.consumed_samples, result.validation

    one, other = run_ranks(2, body, timeout=120)
    assert one == other
    assert one[:2] == (6, 48)
    config = own_run(tmp_path)
    config.train.train_iters = 6
    wanted = plain_torch(config, pattern=2, steps=6)
    assert series(tmp_path / "run", "error") == pytest.approx(wanted.losses, rel=2e-6)
    found = series(tmp_path / "run", "validation/error")
    assert found[0] == pytest.approx(error_of(7, FIRST["wiki"], 9), rel=1e-6)
    said = capfd.readouterr().out
    assert (
        "warning: train data has 24 samples on rank 1 and 40 on rank 0: the first 24 count on "
        "every rank\n"
    ) in said
    assert "warning: validation data has 9 samples on rank 0 and 17 on rank 1" in said
    assert "evaluates validation 9 of 9 samples" in said


def test_the_smallest_size_counts_for_each_of_several_sets(tmp_path: Path) -> None:
    def body() -> Any:
        data = SizesOfRanks(validation=(24, 16), code=(8, 24))
        config = own_run(tmp_path / "run", dataset=data)
        config.validation = ValidationConfig(eval_at_start=True)
        config.train.train_iters = 1
        pretrain(config, token_step)

    run_ranks(2, body, timeout=120)
    for name, size in (("wiki", 16), ("code", 8)):
        first = series(tmp_path / "run", f"validation/{name}/error")[0]
        assert first == pytest.approx(error_of(7, FIRST[name], size), rel=1e-6)


def test_data_that_only_one_rank_has_is_an_error_on_every_rank(tmp_path: Path) -> None:
    def body() -> str:
        config = own_run(tmp_path / "run", dataset=SizesOfRanks(validation=(8, 0)))
        with pytest.raises(ValueError, match="build the same splits") as error:
            pretrain(config, token_step)
        return str(error.value)

    expected = "dataset: validation data has 0 samples on rank 1 and 8 on rank 0; build the same"
    assert all(message.startswith(expected) for message in run_ranks(2, body, timeout=120))
