"""An evaluation is the sum over the set by the sum over the set, and leaves no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bridge.training.config import TrainConfig, ValidationConfig
from bridge.training.gpt_step import forward_step as gpt_forward_step
from bridge.training.pretrain import pretrain
from evaluation_runs import error_of, evaluated
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import (
    OwnData,
    OwnModel,
    TokenData,
    a_run,
    gpt_run,
    own_run,
    plain_torch,
    series,
    token_step,
)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_value_is_the_sum_over_the_set_by_the_tokens_of_the_set(
    tmp_path: Path, world_size: int
) -> None:
    def body() -> list[Any]:
        found = []
        for eval_iters in (None, 1, 2, 50):
            config = own_run(
                tmp_path / f"{eval_iters}",
                dataset=OwnData(validation=27),
                model=OwnModel(dropout=0.5),
                validation=ValidationConfig(eval_iters=eval_iters),
            )
            with a_run(config, token_step) as run:
                result = evaluated(run)
                counted = run.state.train_state.consumed_validation_samples
                assert counted == result.samples
                found.append((result.samples, result.metrics["error"]))
        return found

    for found in run_ranks(world_size, body, timeout=120):
        assert [samples for samples, _ in found] == [24, 8, 16, 24]
        for samples, error in found:
            assert error == pytest.approx(error_of(7, 1000, samples), rel=1e-6)


def test_a_set_smaller_than_a_global_batch_is_evaluated_in_part_of_one(tmp_path: Path) -> None:
    def body() -> Any:
        with a_run(own_run(tmp_path / "run", dataset=OwnData(validation=7)), token_step) as run:
            result = evaluated(run)
            return result.samples, result.metrics["error"]

    for samples, error in run_ranks(2, body, timeout=120):
        assert (samples, error) == (4, pytest.approx(error_of(7, 1000, 4), rel=1e-6))


def test_ranks_that_would_not_end_together_are_refused(tmp_path: Path) -> None:
    def body() -> None:
        with (
            a_run(own_run(tmp_path / "run", dataset=OwnData(validation=8)), token_step) as run,
            pytest.raises(ValueError, match="3 samples are not a multiple of 2"),
        ):
            evaluated(run, num_samples=3)

    run_ranks(1, body, timeout=120)


def test_training_goes_on_as_if_there_had_been_no_evaluation(tmp_path: Path) -> None:
    """With overlapped gathering, whose hooks are off while parameters are whole."""

    def body() -> None:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.validation = ValidationConfig(eval_interval=1, eval_at_start=True)
        assert config.ddp.overlap_param_gather
        pretrain(config, token_step)

    run_ranks(2, body, timeout=120)
    wanted = plain_torch(own_run(tmp_path), pattern=2, steps=5)
    assert series(tmp_path / "run", "error") == pytest.approx(wanted.losses, rel=2e-6)
    found = series(tmp_path / "run", "validation/error")
    assert len(found) == 6
    assert found[0] == pytest.approx(error_of(7, 1000, 8), rel=1e-6)
    # The first step has rate 0.
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] != found[1]


def test_every_module_is_back_in_its_mode_after_an_exception(tmp_path: Path) -> None:
    def failing(data_iterator: Any, model: Any) -> Any:
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError

    def body() -> None:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        with a_run(config, failing) as run:
            module: Any = run.model[0]
            module.module.module.dropout.eval()
            hooks = list(module.remove_forward_pre_hook_handles)
            with pytest.raises(ZeroDivisionError):
                evaluated(run)
            assert len(hooks) > 0
            assert module.remove_forward_pre_hook_handles.keys() == set(hooks)
            assert module.training
            assert module.module.module.inner.training
            assert not module.module.module.dropout.training
            assert run.state.train_state.consumed_validation_samples == 0

    run_ranks(2, body, timeout=120)


def test_no_evaluation_takes_place_where_it_is_turned_off(tmp_path: Path) -> None:
    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=1))
        config.validation = ValidationConfig(eval_iters=0, eval_interval=1, eval_at_start=True)
        config.train.train_iters = 1
        return pretrain(config, token_step).validation

    assert run_ranks(1, body, timeout=120) == [{}]
    assert series(tmp_path / "run", "validation/error") == []


def test_collected_data_comes_from_the_last_stage_one_item_a_microbatch(tmp_path: Path) -> None:
    def collecting(data_iterator: Any, model: Any) -> Any:
        output, _ = gpt_forward_step_of(data_iterator, model)
        return output, lambda losses: {"worst": float(losses.max()), "shape": tuple(losses.shape)}

    def gpt_forward_step_of(data_iterator: Any, model: Any) -> Any:
        return gpt_forward_step(state[0], data_iterator, model)

    state: list[Any] = []

    def body() -> Any:
        config = gpt_run(tmp_path / "run", tiny_gpt(pipeline_model_parallel_size=2))
        config.dataset = TokenData(validation=8)
        with a_run(config, collecting) as run:
            state.append(run.state)
            result = evaluated(run, samples=6, collect_non_loss_data=True)
            assert result.metrics == {}
            return dist.get_rank(), result.non_loss_data

    (_, first), (_, last) = run_ranks(2, body, timeout=120)
    assert first == []
    assert [item["shape"] for item in last] == [(1, 16)] * 6
    assert len({item["worst"] for item in last}) == 6


def test_an_interleaved_pipeline_evaluates_only_what_fills_it(tmp_path: Path) -> None:
    def body(validation: int) -> Any:
        model = tiny_gpt(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
        config = gpt_run(
            tmp_path / f"{validation}", model, dataset=TokenData(validation=validation)
        )
        config.train = TrainConfig(train_iters=1, global_batch_size=4)
        return pretrain(config, gpt_forward_step).validation["lm loss"]

    def both() -> Any:
        with pytest.raises(ValueError, match="1 samples are fewer than the 2"):
            body(1)
        return body(3)

    (loss, same) = run_ranks(2, both, timeout=120)
    assert loss == same > 0
