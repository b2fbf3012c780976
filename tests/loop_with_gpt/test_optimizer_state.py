"""The optimizer's state of each parameter is restored, for gradient buffers of any form."""

import contextlib
import math
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.checkpoint import checkpointer, run_state
from bridge.training.config import ConfigContainer
from bridge.training.usage_error import UsageError
from ranks import run_ranks
from training_runs import a_run, own_run, token_step


class Shapes(torch.nn.Module):
    """A module with parameters of given shapes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        for index, shape in enumerate(shapes):
            setattr(self, f"weight{index}", torch.nn.Parameter(torch.zeros(shape)))


@dataclass(kw_only=True)
class ShapesModel:
    """Builds `Shapes`, drawn at random from a seed."""

    seed: int

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        draw = random.Random(self.seed)
        return Shapes(
            [
                tuple(draw.randint(1, 30) for _ in range(draw.randint(1, 2)))
                for _ in range(draw.randint(3, 12))
            ]
        )


def run_of(directory: Path, seed: int, ranks: int, *, resume: bool) -> ConfigContainer:
    """Return a run with buckets that are drawn anew for every number of ranks."""
    draw = random.Random(10 * seed + ranks)
    config = own_run(directory / str(seed), model=ShapesModel(seed=seed))
    config.train.global_batch_size, config.train.micro_batch_size = 6, 1
    config.checkpoint.resume = resume
    config.ddp.bucket_size = draw.choice([1, 50, 200, 10_000])
    config.mixed_precision.precision = draw.choice(["fp32", "bf16"])
    return config


def expected(name: str, key: str, shape: torch.Size) -> torch.Tensor:
    """Return the values of a parameter or of a state of it, which no other has."""
    seed = zlib.crc32(f"{name} {key}".encode())
    values = torch.rand(math.prod(shape), generator=torch.Generator().manual_seed(seed))
    # Weights are the same in bf16.
    return 1 + values.bfloat16().float() if key == "param" else values


def states_of(run: Any) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """Yield name, key, this rank's shard of the state and the expected one."""
    for single in run.parts.optimizer.chained_optimizers:
        for parameter in single.model_param_gbuf_map:
            name = next(n for n, p in run.parts.model[0].named_parameters() if p is parameter)
            part = single._get_model_param_range_map(parameter)["param"]
            group, order = single.model_param_group_index_map[parameter]
            main = single.optimizer.param_groups[group]["params"][order]
            for key, tensor in {"param": main, **single.optimizer.state[main]}.items():
                name = name.rpartition(".")[2]
                wanted = expected(name, key, parameter.shape)[part.start : part.end]
                yield name, key, tensor.detach(), wanted


def save(directory: Path, seeds: Iterable[int], ranks: int) -> list[int]:
    """Save a run of each seed; return the seeds with padding before another bucket."""
    padded = []
    for seed in seeds:
        with a_run(run_of(directory, seed, ranks, resume=False), token_step) as run:
            for single in run.parts.optimizer.chained_optimizers:
                single.init_state_fn(single.optimizer, single.config)
                if any(
                    bucket.grad_data.numel() > bucket.numel_unpadded
                    for buffer in single.buffers
                    for bucket in buffer.buckets[:-1]
                ):
                    padded.append(seed)
            with torch.no_grad():
                for name, parameter in run.parts.model[0].named_parameters():
                    name = name.rpartition(".")[2]
                    parameter.copy_(expected(name, "param", parameter.shape).view_as(parameter))
                for _, _, tensor, wanted in states_of(run):
                    tensor.copy_(wanted)
            run.parts.state.train_state.step = 1
            run.parts.checkpointer.save()
    return padded


def load(directory: Path, seeds: Iterable[int], ranks: int) -> list[str]:
    """Return the states that are not as they were saved."""
    wrong = []
    for seed in seeds:
        with a_run(run_of(directory, seed, ranks, resume=True), token_step) as run:
            wrong += [
                f"seed {seed}: {key} of {name}"
                for name, key, tensor, wanted in states_of(run)
                if not torch.equal(tensor.cpu(), wanted)
            ]
    return wrong


def test_the_state_of_every_parameter_comes_back_from_buckets_of_any_size_on_any_ranks(
    tmp_path: Path,
) -> None:
    seeds = range(3)
    for saving, loading in ((3, 2), (1, 3)):
        place = tmp_path / str(saving)
        padded = run_ranks(saving, save, place, seeds, saving, timeout=120)
        assert len(padded[0]) >= 2
        assert run_ranks(loading, load, place, seeds, loading, timeout=120) == [[]] * loading


def save_as_before(directory: Path, seeds: Iterable[int], ranks: int) -> list[int]:
    """Save in the first format."""
    checkpointer.FORMAT_VERSION = 1  # type: ignore[attr-defined]
    checkpointer.offsets_without_padding = contextlib.nullcontext  # type: ignore[assignment,attr-defined]
    return save(directory, seeds, ranks)


def test_a_shifted_state_of_the_first_format_is_rejected_and_an_intact_one_continues(
    tmp_path: Path,
) -> None:
    seeds = range(4)

    [shifted] = run_ranks(1, save_as_before, tmp_path, seeds, 1, timeout=120)
    whole = [seed for seed in seeds if seed not in shifted]
    assert shifted
    assert whole

    def messages() -> list[str]:
        assert load(tmp_path, whole, 1) == []
        found = []
        for seed in shifted:
            with pytest.raises(UsageError, match="its weights are intact") as error:
                load(tmp_path, [seed], 1)
            found.append(str(error.value))
        run_state.FORMAT_VERSION = 0
        with pytest.raises(UsageError, match="has format version 1, .* reads versions up to 0"):
            load(tmp_path, whole, 1)
        return found

    for seed, message in zip(shifted, run_ranks(1, messages)[0], strict=True):
        checkpoint = tmp_path / str(seed) / "checkpoints" / "step-0000001"
        assert f"checkpoint.pretrained_checkpoint={checkpoint}" in message
