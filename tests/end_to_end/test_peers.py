"""A run that fails on one rank ends on all, in any layout and under any launcher."""

import os
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from bridge.training.ranks import failure_watch
from bridge.training.state import GlobalState
from gpt_models import tiny_gpt
from ranks import RankFailure, run_ranks
from training_runs import gpt_run

SECONDS_UNTIL_ALL_ARE_GONE = 30.0


PIPELINE = {"pipeline_model_parallel_size": 2}


class Broken:
    """Data that cannot be read."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __iter__(self) -> "Broken":
        return self

    def __next__(self) -> Any:
        raise self.error("no more")


@pytest.mark.parametrize(
    ("layout", "failing", "error"),
    [
        ({}, 0, ValueError),
        # Rank 1 waits for what rank 0 reads for both.
        ({"tensor_model_parallel_size": 2}, 0, StopIteration),
        (PIPELINE, 0, ValueError),
        (PIPELINE, 0, StopIteration),
        (PIPELINE, 1, ValueError),
    ],
    ids=["data", "tensor", "first stage", "end on first stage", "last stage"],
)
def test_data_that_fail_on_one_rank_end_the_other(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    layout: dict[str, Any],
    failing: int,
    error: type[Exception],
) -> None:
    monkeypatch.setattr(failure_watch, "SECONDS_TO_NOTICE", 0.5)
    kept = []

    def step(state: GlobalState, data_iterator: Any, model: Any) -> Any:
        fails = state.train_state.step == 1 and int(os.environ["RANK"]) == failing
        return forward_step(state, Broken(error) if fails else data_iterator, model)

    def body() -> None:
        try:
            pretrain(gpt_run(tmp_path / "run", tiny_gpt(num_layers=2, **layout)), step)
        except Exception as caught:
            kept.append(caught)  # The exception keeps the connections that the other rank waits on.

    with pytest.raises(RankFailure, match=f"^rank {1 - failing} died without a report$"):
        run_ranks(2, body, timeout=60)
    said = capfd.readouterr().err
    what = f"in step 2: {error.__name__}: no more"
    assert f"rank {failing}, {what}\n" in said
    assert f"rank {1 - failing}, in step 2: ends, since rank {failing} failed {what}\n" in said


SCRIPT = """
import os, time
from dataclasses import dataclass

import torch
from bridge.training.config import ConfigContainer, LoggerConfig, TrainConfig
from bridge.training.pretrain import pretrain


@dataclass(kw_only=True)
class Perceptron:
    def build(self, pg_collection, pre_process, post_process, vp_stage):
        return torch.nn.Linear(1, 1)


@dataclass(kw_only=True)
class Line:
    def build(self, request):
        x = torch.linspace(-3, 3, 64)[:, None]
        return [list(zip(x, x))]


def forward_step(state, data_iterator, model):
    if state.train_state.step == 2 and os.environ["RANK"] == "1":
        open("failed", "w").close()
        raise ValueError("a shape does not fit")
    x, y = next(data_iterator)
    return model(x), lambda output: (torch.nn.functional.mse_loss(output, y), {})


config = ConfigContainer(model=Perceptron(), dataset=Line())
config.train = TrainConfig(train_iters=5, micro_batch_size=2, global_batch_size=4)
config.logger = LoggerConfig(log_interval=1, tensorboard=False)
config.checkpoint.run_dir = "run"
try:
    pretrain(config, forward_step)
except ValueError as error:
    kept = error
    time.sleep(600)
"""


def test_a_script_under_torchrun_that_catches_its_error_ends_on_all_ranks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_watch, "SECONDS_TO_NOTICE", 0.5)
    (tmp_path / "own.py").write_text(SCRIPT)

    def rank() -> None:
        os.chdir(tmp_path)
        runpy.run_path("own.py", run_name="__main__")

    def torchrun() -> int:
        # What `torchrun` does; the ranks are forked, which spares their imports.
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            run_id="own",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            start_method="fork",
            logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path)),
        )
        try:
            elastic_launch(settings, rank)()
        except ChildFailedError as error:
            return error.get_first_failure()[1].exitcode
        return 0

    begin = time.monotonic()
    assert run_ranks(1, torchrun, timeout=60, process_group=False) == [1]
    assert time.monotonic() - begin < SECONDS_UNTIL_ALL_ARE_GONE
    assert (tmp_path / "failed").exists()
    said = capfd.readouterr().err
    what = "in step 3: ValueError: a shape does not fit\n"
    assert said.startswith(f"rank 1, {what}")
    assert said.count(f"rank 1, {what}") == 1
    assert f"\nrank 0, in step 3: ends, since rank 1 failed {what}" in said
