"""A user's package with recipes of small models; needs no GPT."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, override

import pytest
import torch

import installed_packages
from bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig, TrainConfig
from bridge.training.contracts import DataRequest, DataSplits, Recipe
from bridge.training.ranks.launcher_store import is_logging_rank
from bridge.training.state import GlobalState
from bridge.training.usage_error import UsageError


@dataclass(kw_only=True)
class Perceptron:
    width: int = 8

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(1, self.width), torch.nn.Tanh(), torch.nn.Linear(self.width, 1)
        )


class Points:
    def __init__(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.seconds)
        x = torch.tensor([6 * index / self.size - 3])
        return x, x.sin()


@dataclass(kw_only=True)
class Sine:
    size: int = 64
    seconds_per_sample: float = 0.0
    """Seconds in which a test can act during a step."""

    def build(self, request: DataRequest) -> DataSplits:
        if self.size == 13:
            raise UsageError("dataset.size=13: only found when the data is built; take another")
        if self.size == 14 and os.environ.get("RANK") == "1":
            raise UsageError("dataset.size=14: only rank 1 minds")
        return DataSplits(train=Points(self.size, self.seconds_per_sample))


@dataclass(kw_only=True)
class Faulty:
    """Data that fails in one of its functions, with an error of a given kind."""

    place: str = ""
    error: Literal["ValueError", "KeyError", "UsageError"] = "ValueError"
    size: int = 8

    def __post_init__(self) -> None:
        self.fail("section")

    def fail(self, place: str) -> None:
        if place == self.place:
            kinds = {"ValueError": ValueError, "KeyError": KeyError, "UsageError": UsageError}
            raise kinds[self.error](f"dataset.place={place}: fails")

    def build(self, request: DataRequest) -> DataSplits:
        self.fail("build")
        return DataSplits(train=FaultySamples(self), collate=self.collate)

    def collate(self, samples: Sequence[Any]) -> Any:
        self.fail("collate")
        batch = torch.utils.data.default_collate(list(samples))
        # A lambda cannot be sent to another process.
        return [*batch, lambda: None] if self.place == "sending" else batch


class FaultySamples:
    def __init__(self, config: Faulty) -> None:
        self.config = config

    def __len__(self) -> int:
        self.config.fail("length")
        return self.config.size

    def __getitem__(self, index: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        self.config.fail("sample")
        x = torch.tensor([float(index)])
        return x, x


@dataclass(kw_only=True)
class FaultyPerceptron(Perceptron):
    fails: bool = False

    @override
    def build(self, *arguments: Any, **named: Any) -> torch.nn.Module:
        if self.fails:
            raise ValueError("the model fails")
        return super().build(*arguments, **named)


def forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
    x, y, *_ = next(data_iterator)
    return model(x), lambda output: (torch.nn.functional.mse_loss(output, y), {})


def _failing(error: type[Exception]) -> Callable[..., Any]:
    def failing_step(state: GlobalState, data_iterator: Iterator[Any], model: Any) -> Any:
        if state.train_state.step == 2 and os.environ.get("RANK", "0") == "1":
            raise error("a shape does not fit")
        return forward_step(data_iterator, model)

    return failing_step


def _make_config() -> ConfigContainer:
    return ConfigContainer(
        model=Perceptron(),
        dataset=Sine(),
        train=TrainConfig(train_iters=6, micro_batch_size=2, global_batch_size=4),
        logger=LoggerConfig(log_interval=1, tensorboard=False),
        checkpoint=CheckpointConfig(save_interval=2),
    )


def _killed_step(state: GlobalState, data_iterator: Iterator[Any], model: Any) -> Any:
    if state.train_state.step == 2 and os.environ.get("RANK", "0") == "1":
        os.kill(os.getpid(), 9)
    return forward_step(data_iterator, model)


sine = Recipe(
    name="sine", summary="learns a sine", make_config=_make_config, forward_step=forward_step
)
failing = Recipe(
    name="failing",
    summary="raises on rank 1 in step 3",
    make_config=_make_config,
    forward_step=_failing(RuntimeError),
)
killed = Recipe(
    name="killed",
    summary="is killed on rank 1 in step 3",
    make_config=_make_config,
    forward_step=_killed_step,
)
mistaken = Recipe(
    name="mistaken",
    summary="raises a ValueError on rank 1 in step 3",
    make_config=_make_config,
    forward_step=_failing(ValueError),
)


class Heckler:
    """A callback that raises after two steps, on rank 0.

    If every rank raised, the first one to fail would be random.
    """

    def on_step_end(self, context: Any, result: Any) -> None:
        if context.state.train_state.step == 2 and is_logging_rank():
            raise RuntimeError("enough")


heckled = Recipe(
    name="heckled",
    summary="has a callback that raises on rank 0 in step 2",
    make_config=_make_config,
    forward_step=forward_step,
    callbacks=lambda: [Heckler()],
)

faulty = Recipe(
    name="faulty",
    summary="fails where it is asked to",
    make_config=lambda: dataclasses.replace(
        _make_config(), model=FaultyPerceptron(), dataset=Faulty()
    ),
    forward_step=forward_step,
)

_ENTRY_POINTS = """[bridge.recipes]
faulty = own_recipe:faulty
sine = own_recipe:sine
failing = own_recipe:failing
killed = own_recipe:killed
mistaken = own_recipe:mistaken
heckled = own_recipe:heckled
"""


def install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install this package, as pip would, for the time of a test."""
    installed_packages.install(place, "own-recipe", _ENTRY_POINTS, monkeypatch)


def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder, with this package installed and no launcher's variables."""
    of_slurm = [name for name in os.environ if name.startswith("SLURM_")]
    of_cuda = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS")
    for name in ("RANK", "WORLD_SIZE", *of_cuda, *of_slurm):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    place = tmp_path / "site"
    place.mkdir()
    install(place, monkeypatch)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
