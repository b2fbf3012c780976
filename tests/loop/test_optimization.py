"""The rate is a function of the samples consumed, whatever the run's length."""

from pathlib import Path
from typing import Any

import pytest
from megatron.core.optimizer import OptimizerConfig

from bridge.training.config import SchedulerConfig, TrainConfig
from bridge.training.optimization import learning_rate
from ranks import run_ranks
from training_runs import a_run, own_run, token_step


def rates(directory: Path, scheduler: SchedulerConfig, optimizer: OptimizerConfig) -> list[float]:
    """Return the rate of each of ten steps and of the one that would follow."""

    def body() -> list[float]:
        config = own_run(directory, scheduler=scheduler, optimizer=optimizer)
        config.train = TrainConfig(train_iters=10, global_batch_size=8, micro_batch_size=8)
        with a_run(config, token_step) as run:
            found = [learning_rate(run.optimizer)]
            for _ in range(10):
                run.scheduler.step(increment=8)
                found.append(learning_rate(run.optimizer))
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
            return run.config.optimizer.min_lr, config.optimizer.min_lr

    assert run_ranks(1, body, timeout=120) == [(None, None)]
