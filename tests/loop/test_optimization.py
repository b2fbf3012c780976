"""The learning rate is a function of the consumed samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import pytest
from megatron.core.optimizer import OptimizerConfig

from bridge.training.config import SchedulerConfig, TrainConfig
from bridge.training.optimizer.scheduler import learning_rate
from bridge.training.usage_error import UsageError
from ranks import run_ranks
from training_runs import OwnModel, a_run, one_step, own_run, parameters_of, token_step


def rates(directory: Path, scheduler: SchedulerConfig, optimizer: OptimizerConfig) -> list[float]:
    """Return the rate of each of ten steps and of the one that would follow."""

    def body() -> list[float]:
        config = own_run(directory, scheduler=scheduler, optimizer=optimizer)
        config.train = TrainConfig(train_iters=10, global_batch_size=8, micro_batch_size=8)
        with a_run(config, token_step) as run:
            found = [learning_rate(run.parts.optimizer, run.parts.scheduler)]
            for _ in range(10):
                run.parts.scheduler.step(increment=8)
                found.append(learning_rate(run.parts.optimizer, run.parts.scheduler))
            return found

    return run_ranks(1, body, timeout=120)[0]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"lr_decay_style": "constant"}, [1.0] * 11),
        (
            {"lr_decay_style": "linear"},
            [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
        ),
        (
            {"lr_decay_style": "linear", "lr_warmup_iters": 5, "lr_warmup_init": 0.5},
            [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0],
        ),
        (
            {"lr_decay_style": "linear", "lr_decay_iters": 5},
            [1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ),
        (
            {
                "lr_decay_style": "WSD",
                "lr_warmup_fraction": 0.2,
                "lr_wsd_decay_iters": 4,
                "lr_wsd_decay_style": "linear",
            },
            [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0],
        ),
    ],
)
def test_the_rate_follows_the_schedule(
    tmp_path: Path, scheduler: dict[str, Any], expected: list[float]
) -> None:
    """Without optimizer.min_lr, which megatron-core leaves open, it ends at 0."""
    found = rates(tmp_path / "run", SchedulerConfig(**scheduler), OptimizerConfig(lr=1.0))
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_users_optimizer_section_is_not_written_to(tmp_path: Path) -> None:
    def body() -> Any:
        config = own_run(tmp_path / "run", optimizer=OptimizerConfig(lr=1.0))
        with a_run(config, token_step) as run:
            return run.parts.config.optimizer.min_lr, config.optimizer.min_lr

    assert run_ranks(1, body, timeout=120) == [(None, None)]


@dataclass(kw_only=True)
class TwoRates(OwnModel):
    """One layer learns at a tenth of the rate."""

    def learning_rate_multiplier(self, parameter: str) -> float:
        assert parameter.startswith(("inner.", "outer."))
        return 0.1 if parameter.startswith("inner.") else 1.0


@pytest.mark.parametrize("distributed", [True, False])
def test_a_model_may_have_a_rate_for_each_of_its_parameters(
    tmp_path: Path, distributed: bool
) -> None:
    """Adam's first step is the rate, whatever the gradient."""

    def body() -> tuple[float, dict[str, float], set[float]]:
        optimizer = OptimizerConfig(
            lr=0.5, min_lr=0.25, weight_decay=0.0, adam_eps=1e-30, clip_grad=0.0
        )
        config = own_run(tmp_path / f"{distributed}", model=TwoRates(), optimizer=optimizer)
        config.scheduler = SchedulerConfig(lr_decay_style="linear")
        config.ddp.use_distributed_optimizer = distributed
        config.ddp.overlap_param_gather = distributed
        with a_run(config, token_step) as run:
            before = parameters_of(run.parts.model)
            result = one_step(run)
            moved = {
                name: float((after - before[name]).abs().median())
                for name, after in parameters_of(run.parts.model).items()
            }
            run.parts.scheduler.step(increment=10**6)
            return result.learning_rate, moved, {g["lr"] for g in run.parts.optimizer.param_groups}

    rate, moved, last = run_ranks(1, body, timeout=120)[0]
    assert rate == 0.5
    assert moved == {
        "inner.weight": pytest.approx(0.05),
        "inner.bias": pytest.approx(0.05),
        "outer.weight": pytest.approx(0.5),
        "outer.bias": pytest.approx(0.5),
    }
    assert sorted(last) == pytest.approx([0.025, 0.25])


@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_with_several_rates_continues_at_another_rate_or_is_rejected_in_our_words(
    tmp_path: Path, distributed: bool
) -> None:
    def continued(**changes: Any) -> list[float]:
        config = own_run(tmp_path / f"{distributed}", model=TwoRates())
        config.ddp.use_distributed_optimizer = distributed
        config.ddp.overlap_param_gather = distributed
        config.checkpoint.resume = bool(changes)
        for name, value in changes.items():
            section, _, field = name.rpartition("__")
            setattr(getattr(config, section) if section else config, field, value)
        with a_run(config, token_step) as run:
            if not changes:
                one_step(run)
                run.parts.checkpointer.save()
            return sorted({group["max_lr"] for group in run.parts.optimizer.param_groups})

    class ThreeRates(TwoRates):
        @override
        def learning_rate_multiplier(self, parameter: str) -> float:
            return 0.3 if parameter == "inner.bias" else super().learning_rate_multiplier(parameter)

    def body() -> list[Any]:
        found: list[Any] = [continued(), continued(optimizer__lr=0.2)]
        fields = ("ddp__use_distributed_optimizer", "ddp__overlap_param_gather")
        rejected: list[dict[str, Any]] = [
            {"model": ThreeRates()},
            dict.fromkeys(fields, not distributed),
        ]
        for changes in rejected:
            with pytest.raises(UsageError) as error:
                continued(**changes)
            found.append(str(error.value))
        return found

    [[before, after, third, other]] = run_ranks(1, body, timeout=120)
    assert before == pytest.approx([0.005, 0.05])
    assert after == pytest.approx([0.02, 0.2])
    assert "some parameters learn at 0.015 at most, and the checkpoint has none that did" in third
    value = "false" if distributed else "true"
    assert other.startswith(f"ddp.use_distributed_optimizer={value}: ")
    assert "leave it so, or start a new run from its weights with checkpoint.pretrained" in other
