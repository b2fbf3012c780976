"""`finetune` from Python: the run of `pretrain`, started from the weights of another run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.config import ConfigContainer, ConfigError
from bridge.training.finetune import finetune
from bridge.training.pretrain import pretrain
from ranks import run_ranks
from training_runs import (
    Killed,
    Killer,
    OwnModel,
    own_run,
    parameters_of,
    series,
    token_step,
)


class Start:
    """A callback that keeps the parameters before the first step."""

    def on_train_start(self, context: Any) -> None:
        self.parameters = parameters_of(context.model)


def base(place: Path) -> ConfigContainer:
    config = own_run(place)
    config.checkpoint.save_interval, config.checkpoint.keep_last = 2, 0
    config.train.train_iters = 4
    return config


def tuned(place: Path, source: Path | str | None) -> ConfigContainer:
    config = own_run(place)
    config.rng.seed = 99  # other random weights, were there any
    config.checkpoint.pretrained_checkpoint = None if source is None else str(source)
    config.checkpoint.save_interval = 2
    return config


def test_it_starts_from_the_weights_of_a_run_or_of_a_checkpoint(tmp_path: Path) -> None:
    def body() -> None:
        ends: dict[int, dict[str, torch.Tensor]] = {}

        class Saved:
            def on_checkpoint_save(self, context: Any, path: Path) -> None:
                ends[context.state.train_state.step] = parameters_of(context.model)

        pretrain(base(tmp_path / "base"), token_step, [Saved()])
        for name, source, step in (
            ("run", tmp_path / "base", 4),
            ("checkpoint", tmp_path / "base" / "checkpoints" / "step-0000002", 2),
        ):
            start = Start()
            result = finetune(tuned(tmp_path / name, source), token_step, [start])
            assert result.step == 5
            for key, value in ends[step].items():
                assert torch.equal(start.parameters[key], value)
        assert series(tmp_path / "run", "error") != series(tmp_path / "checkpoint", "error")

    run_ranks(1, body)


def _none(place: Path) -> str | None:
    return None


def _absent(place: Path) -> str:
    return str(place / "absent")


def _empty(place: Path) -> str:
    (place / "empty").mkdir()
    return str(place / "empty")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (_none, "fine-tuning needs weights to start from"),
        (_absent, "'.*absent' does not exist; give a run or a checkpoint"),
        (_empty, "'.*empty' holds no checkpoint"),
    ],
)
def test_without_a_checkpoint_it_is_an_error_and_never_random_weights(
    tmp_path: Path, source: Callable[[Path], str | None], complaint: str
) -> None:
    config = tuned(tmp_path / "run", source(tmp_path))
    with pytest.raises(ValueError, match=f"checkpoint.pretrained_checkpoint: {complaint}"):
        finetune(config, token_step)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    def body() -> None:
        pretrain(base(tmp_path / "base"), token_step)
        config = tuned(tmp_path / "run", tmp_path / "base")
        config.model = OwnModel(width=7)
        with pytest.raises(
            ConfigError, match=r"model\.width: the checkpoint .* is of a model with"
        ):
            finetune(config, token_step)
        assert not (tmp_path / "run").exists()

    run_ranks(1, body)


def test_a_resumed_run_continues_bit_for_bit_without_its_base(tmp_path: Path) -> None:
    def body() -> None:
        pretrain(base(tmp_path / "base"), token_step)
        finetune(tuned(tmp_path / "whole", tmp_path / "base"), token_step)
        with pytest.raises(Killed):
            finetune(tuned(tmp_path / "cut", tmp_path / "base"), token_step, [Killer(3)])
        again = tuned(tmp_path / "cut", tmp_path / "base")
        again.checkpoint.resume = True
        shutil.move(tmp_path / "base", tmp_path / "elsewhere")
        assert finetune(again, token_step).step == 5
        # A run that has saved nothing starts again: from its base, which must be there.
        with pytest.raises(Killed):
            finetune(tuned(tmp_path / "new", tmp_path / "elsewhere"), token_step, [Killer(1)])
        again = tuned(tmp_path / "new", None)
        again.checkpoint.resume = True
        with pytest.raises(ValueError, match="fine-tuning needs weights to start from"):
            finetune(again, token_step)
        again.checkpoint.pretrained_checkpoint = str(tmp_path / "elsewhere")
        finetune(again, token_step)

    run_ranks(1, body)
    for name in ("error", "grad_norm", "learning_rate"):
        whole = series(tmp_path / "whole", name)
        assert len(whole) == 5
        assert series(tmp_path / "cut", name) == whole
        assert series(tmp_path / "new", name) == whole
