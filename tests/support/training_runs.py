"""Small runs of the loop: model, data, forward steps, configurations, and one step of a run."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

import torch
from megatron.core.optimizer import OptimizerConfig

from bridge.training.callbacks import Callbacks
from bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    LoggerConfig,
    RNGConfig,
    SchedulerConfig,
    TrainConfig,
    resolve,
)
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.pretrain import TrainResult, pretrain
from bridge.training.ranks.groups import choose_device, ranks_of
from bridge.training.ranks.launcher_store import world_size
from bridge.training.reporting.progress import Progress
from bridge.training.run import Run
from bridge.training.setup import set_up
from bridge.training.train import StepResult, train_step

if TYPE_CHECKING:
    from bridge.gpt.model_config import GPTModelConfig

TOKENS = 3
FEATURES = 4


class OwnModule(torch.nn.Module):
    """A module that knows nothing of megatron-core."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(FEATURES, width)
        self.dropout = torch.nn.Dropout(dropout)
        self.outer = torch.nn.Linear(width, 1)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.outer(self.dropout(torch.tanh(self.inner(x))))
        return output.squeeze(-1)


@dataclass(kw_only=True)
class OwnModel:
    """The section that builds `OwnModule`."""

    width: int = 6
    dropout: float = 0.0
    seq_length: int = TOKENS

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        return OwnModule(self.width, self.dropout)


class Samples:
    """Samples that are a function of their index; their numbers of valid tokens differ."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        index += self.first
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(TOKENS, FEATURES, generator=generator)
        valid = 1 + index % TOKENS
        return {
            "x": x,
            "y": x.sum(dim=1) * 0.5 + 0.1 * index % 1,
            "mask": (torch.arange(TOKENS) < valid).float(),
        }


@dataclass(kw_only=True)
class OwnData:
    """Data that builds `Samples`, different ones for training, validation and test."""

    train: int = 24
    validation: int = 0
    test: int = 0

    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(
            train=Samples(self.train),
            validation=Samples(self.validation, 1000) if self.validation else None,
            test=Samples(self.test, 2000) if self.test else None,
        )


def token_step(data_iterator: Iterator[Any], model: Any) -> tuple[Any, Any]:
    """Pattern 2: the sum of the valid tokens' squared errors, and their number."""
    batch = next(data_iterator)

    def loss_function(output: torch.Tensor) -> tuple[Any, ...]:
        total = ((output - batch["y"]) ** 2 * batch["mask"]).sum()
        count = batch["mask"].sum().to(torch.int)
        return total, count, {"error": torch.stack([total.detach(), count])}

    return model(batch["x"]), loss_function


def mean_step(data_iterator: Iterator[Any], model: Any) -> tuple[Any, Any]:
    """Pattern 1: the mean of the microbatch's squared errors."""
    batch = next(data_iterator)

    def loss_function(output: torch.Tensor) -> tuple[Any, ...]:
        mean = ((output - batch["y"]) ** 2).mean()
        return mean, {"error": mean.detach()}

    return model(batch["x"]), loss_function


def own_run(directory: Path | str, **sections: Any) -> ConfigContainer:
    """Return a run of `OwnModel` that logs every step; `sections` replace its own."""
    values: dict[str, Any] = {
        "model": OwnModel(),
        "dataset": OwnData(),
        "train": TrainConfig(train_iters=5, global_batch_size=8, micro_batch_size=2),
        "optimizer": OptimizerConfig(
            lr=0.05, min_lr=0.001, weight_decay=0.1, adam_beta2=0.95, clip_grad=0.5
        ),
        "scheduler": SchedulerConfig(lr_warmup_fraction=0.4),
        "rng": RNGConfig(seed=7),
        "logger": LoggerConfig(log_interval=1, tensorboard=False),
        "checkpoint": CheckpointConfig(run_dir=str(directory), save_at_end=False),
    }
    return ConfigContainer(**(values | sections))


@dataclass(kw_only=True)
class TokenData:
    """Random tokens with masks of different sizes, for a GPT."""

    train: int = 64
    validation: int = 0

    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(
            train=TokenSamples(self.train),
            validation=TokenSamples(self.validation, 1000) if self.validation else None,
        )


class TokenSamples:
    """`microbatch` of each index, without its batch dimension."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        from gpt_models import microbatch

        return {name: tensor[0] for name, tensor in microbatch(self.first + index).items()}


def gpt_run(directory: Path | str, model: "GPTModelConfig", **sections: Any) -> ConfigContainer:
    """Return a run of a GPT that logs every step; micro batch 1, global batch 4."""
    values: dict[str, Any] = {
        "model": model,
        "dataset": TokenData(),
        "train": TrainConfig(train_iters=5, global_batch_size=4, micro_batch_size=1),
    }
    return own_run(directory, **(values | sections))


def rows(directory: Path | str) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    text = (Path(directory) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def series(directory: Path | str, name: str) -> list[Any]:
    """Return the values of one name, of the rows that have it."""
    return [row[name] for row in rows(directory) if name in row]


class Killed(BaseException):
    """An exception that no code catches, in place of the end of the process."""


@dataclass(frozen=True)
class Killer:
    """A callback that ends a run after a step, as if the process had died."""

    step: int

    def on_step_end(self, context: Any, result: Any) -> None:
        if context.state.train_state.step == self.step:
            raise Killed


@dataclass
class Weights:
    """A callback that keeps the parameters at the end of the run."""

    parameters: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_train_end(self, context: Any) -> None:
        with parameters_in_sync(context.model):
            self.parameters = parameters_of(context.model)


def parameters_of(model: list[Any]) -> dict[str, torch.Tensor]:
    """Return copies of the chunks' parameters by their names within the user's module."""
    return {
        f"{index}." * (len(model) > 1) + name.replace("module.", ""): value.detach().clone()
        for index, chunk in enumerate(model)
        for name, value in chunk.named_parameters()
    }


def trained(
    config: ConfigContainer, step: Callable[..., Any]
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """Run `pretrain`; return its result and the parameters at the end."""
    weights = Weights()
    result = pretrain(config, step, [weights])
    return result, weights.parameters


@contextlib.contextmanager
def a_run(
    config: ConfigContainer, step: Callable[..., Any], callbacks: Sequence[object] = ()
) -> Iterator[Run]:
    """Set up a run and yield it before its first step."""
    device = choose_device(config.dist.device)
    config = resolve(config, device=device, world_size=world_size())
    with (
        ranks_of(config, device) as ranks,
        set_up(config, ranks, step, Callbacks(callbacks), Progress(enabled=False)) as run,
    ):
        yield run


def one_step(run: Run, **arguments: Any) -> StepResult:
    """Call `train_step` as a program with its own loop does."""
    parts = run.parts
    values: dict[str, Any] = {
        "data_iterator": parts.data.training(parts.state.train_state.consumed_train_samples),
        "optimizer": parts.optimizer,
        "pg_collection": parts.ranks.pg_collection,
    }
    values |= arguments
    return train_step(
        parts.forward_step,
        model=parts.model,
        scheduler=parts.scheduler,
        state=parts.state,
        **values,
    )
