"""The model of a configuration: DDP-wrapped chunks with the loop's hooks."""

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.utils import get_model_config

from bridge.training.gpt_step import forward_step
from bridge.training.model.building import count_parameters
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.model.hooks import GradientFinalizer, attach_hooks
from bridge.training.run import Run
from gpt_models import tiny_gpt
from plain_torch import plain_torch
from ranks import run_ranks
from training_runs import (
    OwnModel,
    OwnModule,
    a_run,
    gpt_run,
    one_step,
    own_run,
    parameters_of,
    token_step,
)


def test_a_users_module_is_built_from_the_seed(tmp_path: Path) -> None:
    def body() -> Any:
        with a_run(own_run(tmp_path / "run"), token_step) as run:
            assert count_parameters(run.parts.model) == 6 * 4 + 6 + 6 + 1
            assert all(chunk.training for chunk in run.parts.model)
            return parameters_of(run.parts.model)

    torch.manual_seed(7)
    wanted = dict(OwnModule(6, 0.0).named_parameters())
    for found in run_ranks(2, body, timeout=120):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_chunks_share_the_hooks(tmp_path: Path) -> None:
    def body() -> None:
        model = tiny_gpt(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
        with a_run(gpt_run(tmp_path / "run", model), forward_step) as run:
            assert len(run.parts.model) == 2
            configs = {id(get_model_config(chunk)) for chunk in run.parts.model}
            shared = get_model_config(run.parts.model[0])
            assert configs == {id(shared)}
            assert isinstance(shared.finalize_model_grads_func, GradientFinalizer)
            assert len(shared.no_sync_func) == 2

    run_ranks(2, body, timeout=120)


@pytest.mark.parametrize("place", ["wrapper", "module"])
def test_chunks_that_do_not_share_their_config_are_rejected(tmp_path: Path, place: str) -> None:
    def body() -> None:
        with a_run(own_run(tmp_path / "run"), token_step) as run:
            wrapper: Any = run.parts.model[0]
            holder: Any = wrapper if place == "wrapper" else wrapper.module
            holder.config = copy.copy(holder.config)
            model = [wrapper] if place == "module" else [wrapper, twin(run)]
            with pytest.raises(ValueError, match="PlainModule.config is not the config"):
                attach_hooks(run.parts.config, model, run.parts.optimizer, None)

    def twin(run: Run) -> Any:
        return SimpleNamespace(
            module=run.parts.model[0].module, config=get_model_config(run.parts.model[0].module)
        )

    run_ranks(1, body, timeout=120)


def test_parameters_are_in_sync_inside_and_gathered_by_hooks_again_outside(tmp_path: Path) -> None:
    def body() -> Any:
        with a_run(own_run(tmp_path / "run"), token_step) as run:
            one_step(run)
            one_step(run)
            chunk: Any = run.parts.model[0]
            hooks = set(chunk.remove_forward_pre_hook_handles)
            with contextlib.suppress(ZeroDivisionError), parameters_in_sync(run.parts.model):
                assert not chunk.remove_forward_pre_hook_handles
                whole = parameters_of(run.parts.model)
                raise ZeroDivisionError
            assert set(chunk.remove_forward_pre_hook_handles) == hooks
            assert len(hooks) > 0
            one_step(run)
            with parameters_in_sync(run.parts.model):
                return whole, parameters_of(run.parts.model)

    results = run_ranks(2, body, timeout=120)
    for index, steps in enumerate((2, 3)):
        wanted = plain_torch(own_run(tmp_path), pattern=2, steps=steps).parameters
        for found in results:
            for name, value in wanted.items():
                torch.testing.assert_close(found[index][name], value, rtol=2e-5, atol=2e-6)


def test_a_users_16_bit_module_computes_in_16_bits(tmp_path: Path) -> None:
    def step(data_iterator: Any, model: Any) -> Any:
        output, loss_function = token_step(data_iterator, model)
        return output, lambda out: loss_function(out.float())

    def body() -> tuple[str, str]:
        config = own_run(tmp_path / "run", model=OwnModel())
        config.mixed_precision.precision = "bf16"
        with a_run(config, step) as run:
            parameter: Any = next(run.parts.model[0].parameters())
            one_step(run)
            return str(parameter.dtype), str(parameter.main_grad.dtype)

    assert run_ranks(1, body, timeout=120) == [("torch.bfloat16", "torch.float32")]
