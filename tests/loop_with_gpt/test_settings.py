"""Settings of megatron-core that need code in the training loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from bridge.training.config import (
    ConfigContainer,
    SchedulerConfig,
    TrainConfig,
    apply_overrides,
    resolve,
)
from bridge.training.gpt_step import forward_step
from bridge.training.model.ddp import ddp_parts
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import TokenData, a_run, gpt_run, one_step

EXPERTS = {
    "num_moe_experts": 2,
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "moe_ffn_hidden_size": 16,
    "moe_token_dispatcher_type": "alltoall",
    "moe_z_loss_coeff": 0.1,
}


def tiny_run(directory: Path, **model: Any) -> ConfigContainer:
    """Return a run over the same four samples again and again, with the DDP of a new container."""
    config = gpt_run(
        directory,
        tiny_gpt(num_layers=2, layer_spec="auto", pipeline_dtype=None, **model),
        dataset=TokenData(train=4),
        train=TrainConfig(train_iters=6, global_batch_size=4, micro_batch_size=1),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-2, weight_decay=0.0, adam_beta2=0.95),
        scheduler=SchedulerConfig(lr_decay_style="constant"),
    )
    config.ddp = ConfigContainer(model=config.model, dataset=config.dataset).ddp
    return config


SWITCHES = {
    "none": (),
    "checks": (
        "optimizer.log_num_zeros_in_grad=true",
        "optimizer.decoupled_weight_decay=false",
        "ddp.check_for_nan_in_grad=true",
        "ddp.check_for_large_grads=true",
    ),
    "collectives": (
        "ddp.align_param_gather=true",
        "ddp.num_buckets=3",
        "ddp.pad_buckets_for_high_nccl_busbw=true",
        "ddp.reduce_scatter_with_fp32_accumulation=true",
        "ddp.grad_reduce_in_fp32=false",
    ),
    "no overlap": ("ddp.overlap_param_gather=false", "ddp.overlap_grad_reduce=false"),
    "not distributed": (
        "ddp.overlap_param_gather=false",
        "ddp.use_distributed_optimizer=false",
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_alike_with_every_switch_of_optimizer_and_ddp(
    tmp_path: Path, precision: str
) -> None:
    def body() -> dict[str, list[float]]:
        losses = {}
        for name, switches in SWITCHES.items():
            config = apply_overrides(
                tiny_run(tmp_path / name), [f"mixed_precision.precision={precision}", *switches]
            )
            with a_run(config, forward_step) as run:
                data = run.parts.data.training(0)
                steps = [
                    one_step(run, data_iterator=data, reducer=run.parts.reducer).metrics["lm loss"]
                    for _ in range(3)
                ]
                losses[name] = [loss for loss in steps if loss is not None]
                buckets = len(ddp_parts(run.parts.model)[0].bucket_groups)
                assert (buckets > 1) == (name == "collectives")
        return losses

    first, second = run_ranks(2, body, timeout=120)
    assert first == second
    plain = first.pop("none")
    assert plain[-1] < 0.9 * plain[0]
    for losses in first.values():
        assert losses == pytest.approx(plain, rel=1e-3)


def test_the_zeros_of_all_gradients_are_counted_and_logged(tmp_path: Path) -> None:
    def body() -> tuple[int | None, int]:
        config = tiny_run(tmp_path / "run", **EXPERTS)
        config.optimizer.log_num_zeros_in_grad = True
        with a_run(config, forward_step) as run:
            counted = []

            def count() -> None:
                parameters: list[Any] = [p for part in run.parts.model for p in part.parameters()]
                counted.append(sum(int((p.main_grad == 0).sum()) for p in parameters))

            result = one_step(run, before_optimizer_step=count, reducer=run.parts.reducer)
            run.log(result)
            return result.zeros_in_grad, counted[0]

    for found, wanted in run_ranks(2, body):
        assert found == wanted
        assert wanted > 0  # the embeddings of tokens that do not occur
    assert '"num_zeros_in_grad": ' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_mup_divides_the_rates_of_matrices_by_the_width(tmp_path: Path) -> None:
    def body() -> dict[str, float]:
        config = tiny_run(tmp_path / "run", use_mup=True, mup_base_hidden_size=8)
        with a_run(config, forward_step) as run:
            before = {n: p.detach().clone() for n, p in run.parts.model[0].named_parameters()}
            one_step(run)
            with torch.no_grad():
                parameters = dict(run.parts.model[0].named_parameters())
                return {n: float((p - before[n]).abs().max()) for n, p in parameters.items()}

    (moved,) = run_ranks(1, body)
    # Adam's first step is the rate itself, whatever the gradient; width 32 is four times 8.
    for name, distance in moved.items():
        is_matrix = ".linear_" in name
        assert distance == pytest.approx(1e-2 / 4 if is_matrix else 1e-2, rel=1e-2), name


def test_losses_of_routers_are_logged_by_layer_under_a_pipeline(tmp_path: Path) -> None:
    def body() -> dict[str, float | None]:
        config = tiny_run(
            tmp_path / "run", **EXPERTS, moe_per_layer_logging=True, pipeline_model_parallel_size=2
        )
        with a_run(config, forward_step) as run:
            return dict(one_step(run, reducer=run.parts.reducer).metrics)

    first, second = run_ranks(2, body)
    assert first == second
    layers = [first["z_loss/layer_1"], first["z_loss/layer_2"]]
    assert layers[0] != layers[1]
    assert sum(value or 0 for value in layers) / 2 == pytest.approx(first["z_loss"], rel=1e-6)


def test_deterministic_mode_is_torchs_for_the_time_of_the_run(tmp_path: Path) -> None:
    def body() -> list[bool]:
        seen = [torch.are_deterministic_algorithms_enabled()]
        with a_run(tiny_run(tmp_path / "run", deterministic_mode=True), forward_step) as run:
            seen.append(torch.are_deterministic_algorithms_enabled())
            one_step(run)
        return [*seen, torch.are_deterministic_algorithms_enabled()]

    assert run_ranks(1, body) == [[False, True, False]]


def test_deterministic_mode_on_a_gpu_asks_for_the_libraries_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path / "run", deterministic_mode=True)
    with pytest.raises(ValueError, match=r"model\.deterministic_mode=true: .*NCCL_ALGO=Ring"):
        resolve(config, device="cuda", world_size=1)
    variables = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    resolve(config, device="cuda", world_size=1)
