"""Rules for changes when a run is resumed, or starts from the weights of another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.training.config import ConfigContainer, ConfigError
from bridge.training.pretrain import pretrain
from ranks import run_ranks
from training_runs import OwnModel, own_run, token_step


def _width(config: ConfigContainer) -> None:
    config.model = OwnModel(width=7)


def _seed(config: ConfigContainer) -> None:
    config.rng.seed += 1


def _data(config: ConfigContainer) -> None:
    config.dataset.train += 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_width, "model.width=\\S+: the run was started with"),
        (_seed, "rng.seed=\\S+: the run was started with"),
        (_data, "dataset.train=\\S+: the run was started with"),
    ],
)
def test_a_resumed_run_keeps_its_model_its_data_and_its_seed_on_every_rank(
    change: Callable[[ConfigContainer], Any], message: str, tmp_path: Path
) -> None:
    def body() -> None:
        pretrain(own_run(tmp_path / "run"), token_step)
        config = own_run(tmp_path / "run")
        config.checkpoint.resume = True
        change(config)
        with pytest.raises(ConfigError, match=message):
            pretrain(config, token_step)

    run_ranks(2, body)


def test_a_resumed_run_may_be_longer_and_learn_faster(tmp_path: Path) -> None:
    def body() -> None:
        config = own_run(tmp_path / "run")
        config.checkpoint.save_at_end = True
        result = pretrain(config, token_step)
        config.checkpoint.resume = True
        assert config.train.train_iters is not None
        config.train.train_iters += 1
        config.optimizer.lr = 0.01
        assert pretrain(config, token_step).step == result.step + 1

    run_ranks(1, body)
