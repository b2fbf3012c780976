"""fp16 with a dynamic loss scale: an overflow on one of two ranks counts on both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.training.config import ConfigContainer
from bridge.training.gpt_step import forward_step
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.run import Run
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import a_run, gpt_run, one_step, own_run, parameters_of, token_step

SCALE = 1024.0
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 2,
}
LAYOUTS: dict[str, tuple[dict[str, Any], bool]] = {
    "data, distributed optimizer": ({}, True),
    "tensor": ({"tensor_model_parallel_size": 2}, True),
    "pipeline": ({"pipeline_model_parallel_size": 2}, True),
    "experts": (EXPERTS, False),
}


def run_of(directory: Path, layout: str) -> ConfigContainer:
    sizes, distributed = LAYOUTS[layout]
    model = tiny_gpt(num_layers=2, pipeline_dtype=None, **sizes)
    config = gpt_run(directory, model)
    # A learning rate that rises with every step that is taken.
    config.train.train_iters = 10
    config.scheduler.lr_warmup_init, config.scheduler.lr_warmup_fraction = 0.01, 0.9
    config.mixed_precision.precision = "fp16"
    config.ddp.use_distributed_optimizer = config.ddp.overlap_param_gather = distributed
    config.optimizer.initial_loss_scale = SCALE
    config.optimizer.hysteresis = 2
    config.optimizer.loss_scale_window = 3
    return config


def scales_of(run: Run) -> list[float]:
    return [float(part.get_loss_scale()) for part in run.parts.optimizer.chained_optimizers]


def overflow(run: Run) -> Callable[[], None]:
    """Make one gradient of rank 1 infinite, before any other rank adds its own to it.

    Returns:
        A function that undoes it.
    """
    if dist.get_rank() != 1:
        return lambda: None
    names = [name for name, _ in run.parts.model[0].named_parameters()]
    chosen = [name for name in names if "experts" in name] or names
    parameter = run.parts.model[0].get_parameter(chosen[0])
    handle: Any = parameter.register_hook(lambda gradient: gradient * float("inf"))
    return lambda: handle.remove()


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    with parameters_in_sync(run.parts.model):
        return parameters_of(run.parts.model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_on_one_rank_lowers_every_scale_and_the_run_recovers(
    tmp_path: Path, layout: str
) -> None:
    def body() -> Any:
        found = []
        with a_run(run_of(tmp_path / "run", layout), forward_step) as run:
            data_iterator = run.parts.data.training(0)
            for step in range(1, 9):
                before = weights_of(run)
                end = overflow(run) if step in (2, 4) else lambda: None
                result = one_step(run, data_iterator=data_iterator, reducer=run.parts.reducer)
                end()
                after = weights_of(run)
                changed = [name for name in before if not torch.equal(before[name], after[name])]
                assert result.skipped == (not changed)
                assert result.skipped == (result.grad_norm is None)
                assert result.metrics["lm loss"] is not None
                found.append((result.skipped, scales_of(run), result.learning_rate))
            counters = run.parts.state.train_state
            assert counters.skipped_train_samples == 2 * 4
            return found, {name: value for name, value in after.items() if "experts" not in name}

    ranks = run_ranks(2, body, timeout=120)
    (found, weights), (other, other_weights) = ranks
    assert found == other
    assert [skipped for skipped, *_ in found] == [step in (2, 4) for step in range(1, 9)]
    # The second overflow lowers the scale; three good steps raise it again.
    wanted = [SCALE, SCALE, SCALE, SCALE / 2, SCALE / 2, SCALE / 2, SCALE, SCALE]
    for (_, scales, _), scale in zip(found, wanted, strict=True):
        assert scales == [scale] * (2 if "experts" in layout else 1)
    rates = [rate for *_, rate in found]
    assert rates[2] == rates[1] > rates[0]
    assert rates[4] == rates[3] > rates[2]
    if "data" in layout or "experts" in layout:
        assert weights.keys() == other_weights.keys()
        for name, value in weights.items():
            assert torch.equal(value, other_weights[name]), name


def test_a_loss_scale_survives_a_resume(tmp_path: Path) -> None:
    def state_of(run: Run) -> list[Any]:
        found = []
        for part in run.parts.optimizer.chained_optimizers:
            state = part.grad_scaler.state_dict()
            found.append([float(state["scale"]), *(v for k, v in state.items() if k != "scale")])
        return found

    def body() -> Any:
        config = run_of(tmp_path / "run", "data, distributed optimizer")
        found = []
        for resume in (False, True):
            config.checkpoint.resume = resume
            with a_run(config, forward_step) as run:
                if resume:
                    found.append((run.parts.state.train_state.step, state_of(run)))
                for step in range(3):
                    end = overflow(run) if step < 2 else lambda: None
                    one_step(run)
                    end()
                run.save()
                found.append((run.parts.state.train_state.step, state_of(run)))
        return found

    for first, restored, _ in run_ranks(2, body, timeout=120):
        assert first == restored == (3, [[SCALE / 2, 1, 0]])


def test_a_nan_that_is_skipped_leaves_the_loss_scale_alone(tmp_path: Path) -> None:
    def step(data_iterator: Any, model: Any) -> Any:
        output, loss_function = token_step(data_iterator, model)
        return output, lambda out: loss_function(out.float() * float("nan"))

    def body() -> Any:
        config = own_run(tmp_path / "run")
        config.mixed_precision.precision = "fp16"
        config.optimizer.initial_loss_scale, config.optimizer.hysteresis = SCALE, 1
        config.train.nan_action = "skip"
        with a_run(config, step) as run:
            return [one_step(run).skipped for _ in range(3)], scales_of(run)

    assert run_ranks(2, body, timeout=120) == [([True] * 3, [SCALE])] * 2
