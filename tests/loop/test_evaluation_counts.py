"""An evaluation weighs every sample once, by its tokens, and checks which samples it saw."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from bridge.training.config import TrainConfig, ValidationConfig
from bridge.training.loss_reduction import (
    MetricReducer,
    local,
    maximum,
    mean,
    token_mean,
    total,
)
from ranks import run_ranks
from training_runs import OwnData, Samples, a_run, mean_step, one_step, own_run, token_step
from validation_sets import FIRST, NamedData, error_of, evaluated, tokens_of

WIKI = FIRST["wiki"]


def batches(*, micro: int, batch: int) -> TrainConfig:
    return TrainConfig(train_iters=5, micro_batch_size=micro, global_batch_size=batch)


@pytest.mark.parametrize(
    ("world_size", "micro", "batch", "samples"),
    [(1, 4, 8, 24), (1, 25, 100, 156), (2, 25, 100, 156), (3, 4, 24, 25), (3, 4, 24, 1)],
)
def test_every_sample_of_the_set_counts_once_for_any_batch_size_and_number_of_ranks(
    tmp_path: Path, world_size: int, micro: int, batch: int, samples: int
) -> None:
    def body() -> list[Any]:
        config = own_run(
            tmp_path / "run",
            dataset=OwnData(train=batch, validation=samples),
            train=batches(micro=micro, batch=batch),
        )
        with a_run(config, token_step) as run:
            result = evaluated(run)
            assert run.parts.state.train_state.consumed_validation_samples == samples
            return [
                result.metrics["error"],
                result.tokens,
                (result.samples, result.planned_samples, result.complete, result.non_loss_data),
            ]

    for error, tokens, counts in run_ranks(world_size, body, timeout=120):
        assert error == pytest.approx(error_of(7, WIKI, samples), rel=1e-6)
        assert tokens == tokens_of(WIKI, samples)
        assert counts == (samples, samples, True, [])


def metrics_step(data_iterator: Iterator[Any], model: Any) -> Any:
    """Run pattern 1 with a metric of every kind."""
    x = next(data_iterator)["x"]
    of_sample = model(x).mean(dim=1)

    def loss_function(output: torch.Tensor) -> Any:
        metrics = {
            "mean": mean(output.mean()),
            "tokens": token_mean(output.sum(), 3 * len(output)),
            "total": total(output.sum()),
            "maximum": maximum(output.max()),
            "local": local(output.mean()),
        }
        if dist.get_rank() == 1:
            metrics["rank 1"] = mean(output.mean())
        return output.mean(), metrics

    return of_sample, loss_function


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
def test_every_kind_of_metric_is_that_of_the_samples(
    tmp_path: Path, normalization: Literal["token", "microbatch"]
) -> None:
    """Two ranks: a batch, a microbatch of 2 samples on each, and one sample on one of them."""

    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=17))
        config.train = batches(micro=3, batch=12)
        config.train.loss_normalization = normalization
        with a_run(config, metrics_step) as run:
            with torch.no_grad():
                inputs = [Samples(1, WIKI + index)[0]["x"][None] for index in range(17)]
                outputs = [float(run.parts.model[0](x).mean()) for x in inputs]
            return outputs, evaluated(run).metrics

    ((outputs, first), (_, second)) = run_ranks(2, body, timeout=120)
    whole, part = torch.tensor(outputs, dtype=torch.float64)[:12], outputs[12:]
    # Microbatches in turn, and in the end one sample more on rank 0.
    of_ranks = [
        [*whole[0:3], *whole[6:9], *part[:2], part[4]],
        [*whole[3:6], *whole[9:12], *part[2:4]],
    ]
    averages = [float(sum(values) / len(values)) for values in of_ranks]
    everything = sum(outputs) / 17
    for metrics, average in zip((first, second), averages, strict=True):
        wanted = {
            "mean": everything,
            "tokens": everything / 3,
            "total": 17 * everything,
            "maximum": max(outputs),
            "local": average,
            "rank 1": averages[1],
        }
        assert metrics == pytest.approx(wanted, rel=1e-5)


def test_what_does_not_count_is_neither_watched_nor_collected(tmp_path: Path) -> None:
    """Two batches, a sample on each rank, two more samples: the fourth microbatch of rank 2."""

    def body() -> Any:
        calls = [0]

        def step(data_iterator: Iterator[Any], model: Any) -> Any:
            calls[0] += 1
            output, loss_function = token_step(data_iterator, model)
            is_filled = dist.get_rank() == 2 and calls[0] == 4
            return output * (torch.nan if is_filled else 1), loss_function

        def numbers_step(data_iterator: Iterator[Any], model: Any) -> Any:
            x = next(data_iterator)["x"]
            return model(x), lambda output, non_loss_data: [round(float(v), 4) for v in x[:, 0, 0]]

        config = own_run(
            tmp_path / "run",
            dataset=OwnData(train=12, validation=17),
            train=batches(micro=2, batch=6),
        )
        with a_run(config, step) as run:
            result = evaluated(run)
            warnings = run.parts.check_losses()
            collected = run.context.collect_non_loss_data(numbers_step)
            return result.metrics["error"], warnings, collected

    everyone = run_ranks(3, body, timeout=120)
    for error, warnings, _ in everyone:
        assert error == pytest.approx(error_of(7, WIKI, 17), rel=1e-6)
        assert warnings == []
    data = Samples(17, WIKI)
    wanted = [round(float(data[index]["x"][0, 0]), 4) for index in range(17)]
    assert sorted(v for *_, items in everyone for item in items for v in item) == sorted(wanted)
    assert [item for *_, items in everyone for item in items[:1]] == [
        wanted[0:2],
        wanted[2:4],
        wanted[4:6],
    ]


def test_a_last_batch_of_few_microbatches_weighs_by_its_tokens(tmp_path: Path) -> None:
    """Four microbatches, then one."""

    def body() -> list[Any]:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=10))
        with a_run(config, token_step) as run:
            result = evaluated(run, samples=10)
            return [result.metrics["error"], result.tokens, result.samples]

    [[error, tokens, samples]] = run_ranks(1, body, timeout=120)
    assert error == pytest.approx(error_of(7, WIKI, 10), rel=1e-6)
    assert (tokens, samples) == (tokens_of(WIKI, 10), 10)
    # Had the two batches the same weight:
    halves = (error_of(7, WIKI, 8) + error_of(7, WIKI + 8, 2)) / 2
    assert abs(halves / error - 1) > 0.01


@pytest.mark.parametrize("world_size", [1, 2])
def test_eval_iters_counts_global_batches_of_each_set(tmp_path: Path, world_size: int) -> None:
    def body() -> list[Any]:
        found = []
        for eval_iters in (None, 1, 2, 50):
            config = own_run(
                tmp_path / f"{eval_iters}",
                dataset=NamedData(validation={"wiki": 27, "code": 13}),
                validation=ValidationConfig(eval_iters=eval_iters),
            )
            with a_run(config, token_step) as run:
                results = [evaluated(run, name=f"validation/{name}") for name in ("wiki", "code")]
                found.append([(r.samples, r.tokens, r.metrics["error"]) for r in results])
        return found

    sizes = [(27, 13), (8, 8), (16, 13), (27, 13)]
    for found in run_ranks(world_size, body, timeout=120):
        for of_run, (wiki, code) in zip(found, sizes, strict=True):
            for result, name, size in zip(of_run, ("wiki", "code"), (wiki, code), strict=True):
                assert result[:2] == (size, tokens_of(FIRST[name], size))
                assert result[2] == pytest.approx(error_of(7, FIRST[name], size), rel=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_mean_of_pattern_1_is_over_all_microbatches_and_counts_no_tokens(
    tmp_path: Path, world_size: int
) -> None:
    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=12))
        with a_run(config, mean_step) as run:
            results = [evaluated(run, samples=samples) for samples in (4, 8, 12)]
            return [(r.metrics["error"], r.tokens, r.samples) for r in results]

    for found in run_ranks(world_size, body, timeout=120):
        for size, (error, *counts) in zip((4, 8, 12), found, strict=True):
            assert error == pytest.approx(error_of(7, WIKI, size, valid_only=False), rel=1e-6)
            assert counts == [None, size]


def test_a_group_that_is_not_that_of_the_data_is_an_error_with_both_numbers(
    tmp_path: Path,
) -> None:
    def body() -> str:
        mine, _ = dist.new_subgroups(group_size=1)
        with a_run(own_run(tmp_path / "run", dataset=OwnData(validation=24)), token_step) as run:
            local_only = MetricReducer(
                normalization="token", contributes=True, device=torch.device("cpu"), group=mine
            )
            with pytest.raises(RuntimeError, match="observed") as error:
                evaluated(run, reducer=local_only)
        return str(error.value)

    for message in run_ranks(2, body, timeout=120):
        assert "12 samples were observed and 24 planned" in message


def drawing(per_call: Iterator[int], only_rank: int | None = None) -> Any:
    """A step that draws so many microbatches with each call, of which it uses the last."""
    last: list[Any] = []

    def step(data_iterator: Iterator[Any], model: Any) -> Any:
        number = next(per_call) if only_rank in (None, dist.get_rank()) else 1
        last.extend(next(data_iterator) for _ in range(number))
        return token_step(iter(last[-1:]), model)

    return step


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([1, 0], "the forward step drew 6 of the 12 planned microbatches"),
        ([2], "the forward step draws more than the 12 planned microbatches"),
        ([1, 2, 1], "the forward step draws more than the 12 planned microbatches"),
    ],
)
def test_a_step_that_draws_another_number_of_microbatches_is_rejected(
    tmp_path: Path, pattern: list[int], message: str
) -> None:
    def body() -> None:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=24))
        with (
            a_run(config, drawing(itertools.cycle(pattern))) as run,
            pytest.raises(RuntimeError, match=message),
        ):
            evaluated(run)

    run_ranks(1, body, timeout=120)


def test_one_rank_that_draws_too_little_says_so_and_no_rank_waits(tmp_path: Path) -> None:
    def body() -> str:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=24))
        with (
            a_run(config, drawing(itertools.cycle([1, 0]), only_rank=1)) as run,
            pytest.raises(RuntimeError, match="evaluate:") as error,
        ):
            evaluated(run)
        return str(error.value)

    other, mistaken = run_ranks(2, body, timeout=120)
    assert "drew 3 of the 6 planned microbatches" in mistaken
    assert "on another rank drew another number of the 6 planned" in other


def test_data_that_ends_too_early_is_rejected(tmp_path: Path) -> None:
    def body() -> None:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        with (
            a_run(config, token_step) as run,
            pytest.raises(RuntimeError, match="ended after 4 of 12 planned microbatches"),
        ):
            evaluated(run, num_samples=24)

    run_ranks(1, body, timeout=120)


def test_a_step_that_reads_data_of_its_own_draws_nothing(tmp_path: Path) -> None:
    def reads_nothing(data_iterator: Iterator[Any], model: Any) -> Any:
        batch = {"x": torch.ones(2, 3, 4), "y": torch.zeros(2, 3), "mask": torch.ones(2, 3)}
        return token_step(iter([batch]), model)

    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        with a_run(config, reads_nothing) as run:
            result = evaluated(run)
            return result.samples, result.tokens

    assert run_ranks(2, body, timeout=120) == [(8, 24)] * 2


def test_an_evaluation_that_raises_leaves_nothing_in_a_training_step(tmp_path: Path) -> None:
    def failing_later(calls: int) -> Any:
        left = [calls]

        def step(data_iterator: Iterator[Any], model: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise ZeroDivisionError
            return token_step(data_iterator, model)

        return step

    def body() -> Any:
        found = []
        for name, calls in (("failed", 6), ("none", 0)):
            config = own_run(tmp_path / name, dataset=OwnData(validation=24))
            with a_run(config, failing_later(calls)) as run:
                if calls:
                    with pytest.raises(ZeroDivisionError):
                        evaluated(run)
                    assert run.parts.state.train_state.consumed_validation_samples == 0
                reduced = one_step(run, reducer=run.parts.reducer).reduced
                assert reduced is not None
                found.append((reduced.to_dict(), reduced.microbatches, reduced.tokens))
        return found

    for after_failure, undisturbed in run_ranks(2, body, timeout=120):
        assert after_failure == undisturbed
        assert undisturbed[1] == 4
