"""Runs of colocated modules: under every layout, with frozen modules, without images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from bridge.mimo.model_config import MultimodalModelConfig
from bridge.training.config import ConfigContainer, MixedPrecisionConfig, TrainConfig
from bridge.training.mimo_step import forward_step
from bridge.training.pretrain import pretrain
from mimo_layout_runs import Chosen
from mimo_models import mimo_run, tiny_mimo
from ranks import run_ranks
from training_runs import a_run, one_step, parameters_of, series, trained


def trajectory(directory: Path, world_size: int, model: MultimodalModelConfig) -> Any:
    """Train 5 steps; return the losses and the gradient norms."""
    run_ranks(world_size, lambda: pretrain(mimo_run(directory, model), forward_step), timeout=120)
    return series(directory, "lm loss"), series(directory, "grad_norm")


@pytest.mark.parametrize(
    ("world_size", "model"),
    [
        (2, tiny_mimo(tensor=2, projection="mlp", language={"sequence_parallel": True})),
        (4, tiny_mimo(tensor=2, language={"position_embedding_type": "learned_absolute"})),
    ],
    ids=["sequence", "data and tensor"],
)
def test_a_layout_trains_the_model_of_one_process(
    world_size: int, model: MultimodalModelConfig, tmp_path: Path
) -> None:
    alone = tiny_mimo(projection=model.projections["vision"].kind)
    alone.language.position_embedding_type = model.language.position_embedding_type
    losses, norms = trajectory(tmp_path / "one", 1, alone)
    spread_losses, spread_norms = trajectory(tmp_path / "spread", world_size, model)
    assert len(losses) == 5
    assert spread_losses == pytest.approx(losses, rel=1e-5)
    assert spread_norms == pytest.approx(norms, rel=5e-5)


TEXT = [0] * 16
# Microbatches of two samples: with images, without images, and of both kinds.
TEXT_ON_EVERY_SECOND_RANK = [1, 2, 0, 0, 0, 0, 1, 0, 2, 2, 0, 0, 0, 0, 1, 1]


def without_images(directory: Path, images: list[int]) -> ConfigContainer:
    config = mimo_run(directory, tiny_mimo())
    config.dataset = Chosen(images)
    config.train = TrainConfig(train_iters=3, global_batch_size=8, micro_batch_size=2)
    # Several buckets: gradients are reduced as soon as they are known, parameters gathered as soon
    # as they are needed.
    config.ddp.bucket_size = 1000
    assert config.ddp.overlap_grad_reduce
    assert config.ddp.overlap_param_gather
    return config


def test_an_unused_encoder_has_gradients_of_zero(tmp_path: Path) -> None:
    def body() -> Any:
        with a_run(without_images(tmp_path / "run", TEXT), forward_step) as run:
            gradients: dict[str, torch.Tensor] = {}

            def remember() -> None:
                for name, parameter in run.parts.model[0].named_parameters():
                    gradients[name] = parameter.main_grad.clone()  # type: ignore[attr-defined]

            result = one_step(run, before_optimizer_step=remember)
            return (
                result.skipped,
                {n for n, g in gradients.items() if "modality" in n and g.any()},
                {n for n, g in gradients.items() if "modality" not in n and not g.any()},
                all(g.isfinite().all() for g in gradients.values()),
            )

    skipped, used, unused, finite = run_ranks(1, body, timeout=120)[0]
    assert not skipped
    assert used == set()
    assert unused == set()
    assert finite


def test_ranks_without_images_stay_in_step_with_the_others(tmp_path: Path) -> None:
    """Use different modules in the microbatches of two ranks; a wrong order hangs or differs."""

    def body(name: str) -> Any:
        return trained(without_images(tmp_path / name, TEXT_ON_EVERY_SECOND_RANK), forward_step)[1]

    (alone,) = run_ranks(1, body, "one", timeout=120)
    first, second = run_ranks(2, body, "two", timeout=120)
    assert series(tmp_path / "two", "lm loss") == pytest.approx(
        series(tmp_path / "one", "lm loss"), rel=1e-5
    )
    for name, weight in first.items():
        assert torch.equal(second[name], weight), name
        # Adam divides by the gradient's size, so a gradient of mere rounding errors moves weights.
        torch.testing.assert_close(weight, alone[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("frozen", "prefixes"),
    [
        (["vision"], ["modality_submodules."]),
        (["language", "vision.encoder"], ["language_model.", "modality_submodules.vision.enc"]),
    ],
    ids=["modality", "all but the projection"],
)
def test_frozen_weights_stay_bit_for_bit(
    frozen: list[str], prefixes: list[str], tmp_path: Path
) -> None:
    def body() -> Any:
        config = mimo_run(tmp_path / "run", tiny_mimo(freeze=frozen))
        config.train.train_iters = 2
        with a_run(config, forward_step) as run:
            before = parameters_of(run.parts.model)
            for _ in range(2):
                one_step(run)
            from bridge.training.model.ddp import parameters_in_sync

            with parameters_in_sync(run.parts.model):
                after = parameters_of(run.parts.model)
            return {name for name in before if torch.equal(before[name], after[name])}, set(before)

    for unchanged, names in run_ranks(2, body, timeout=120):
        expected = {name for name in names if name.startswith(tuple(prefixes))}
        assert expected
        assert unchanged == expected


def test_each_module_learns_at_its_own_rate(tmp_path: Path) -> None:
    """Rely on Adam's first step, which is the learning rate whatever the gradient."""

    def body() -> Any:
        model = tiny_mimo(lr_multipliers={"vision": 0.5, "vision.projection": 2.0})
        config = mimo_run(tmp_path / "run", model)
        config.optimizer = OptimizerConfig(
            lr=0.01, min_lr=0.01, weight_decay=0.0, adam_eps=1e-30, clip_grad=0.0
        )
        config.scheduler.lr_warmup_fraction = None
        with a_run(config, forward_step) as run:
            before = parameters_of(run.parts.model)
            one_step(run)
            return {
                name: float((after - before[name]).abs().max())
                for name, after in parameters_of(run.parts.model).items()
            }

    moved = run_ranks(1, body, timeout=120)[0]
    rates = {"language_model.": 0.01, "vision.encoders.": 0.005, "vision.input_projections.": 0.02}
    for part, rate in rates.items():
        found = [value for name, value in moved.items() if part in name]
        assert found == pytest.approx([rate] * len(found), rel=1e-3), part


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    def body(precision: Any) -> None:
        config = mimo_run(tmp_path / precision, tiny_mimo())
        config.mixed_precision = MixedPrecisionConfig(precision=precision)
        pretrain(config, forward_step)

    for precision in ("fp32", "bf16"):
        run_ranks(1, body, precision, timeout=120)
    exact, rounded = (series(tmp_path / name, "lm loss") for name in ("fp32", "bf16"))
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert rounded != exact
