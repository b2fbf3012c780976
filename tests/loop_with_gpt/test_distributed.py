"""The rank, the process groups and the device of a process."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bridge.training.config import resolve
from bridge.training.ranks.groups import choose_device, ranks_of
from bridge.training.ranks.launcher_store import is_logging_rank, rank, world_size
from bridge.training.usage_error import UsageError
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import gpt_run


def test_rank_and_world_size_are_known_before_and_after_the_groups_are_up() -> None:
    def body() -> Any:
        before = rank(), world_size(), is_logging_rank()
        dist.init_process_group("gloo")
        after = rank(), world_size(), is_logging_rank()
        return before, after

    assert run_ranks(2, body, timeout=120, process_group=False) == [
        ((0, 2, True), (0, 2, True)),
        ((1, 2, False), (1, 2, False)),
    ]


def test_one_process_needs_no_launcher() -> None:
    def body() -> Any:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        assert (rank(), world_size()) == (0, 1)
        config = resolve(gpt_run("unused", tiny_gpt()), device="cpu", world_size=1)
        with ranks_of(config, "cpu") as ranks:
            return ranks.layout.data, dist.get_world_size(), ranks.model.is_last_stage

    assert run_ranks(1, body, timeout=120, process_group=False) == [(1, 1, True)]


def test_losses_are_known_at_the_end_of_the_pipeline() -> None:
    def body() -> Any:
        model = tiny_gpt(pipeline_model_parallel_size=2)
        config = resolve(gpt_run("unused", model), device="cpu", world_size=2)
        with ranks_of(config, "cpu") as ranks:
            return ranks.model.is_last_stage, ranks.control_group.size()

    assert run_ranks(2, body, timeout=120) == [(False, 2), (True, 2)]


@pytest.mark.parametrize("ranks_with_embedding", [None, [0, 1], [0, 1, 2]])
def test_groups_without_a_replica_of_the_embedding_are_rejected_on_every_rank(
    ranks_with_embedding: list[int] | None,
) -> None:
    model = tiny_gpt(
        pipeline_model_parallel_size=3,
        pipeline_model_parallel_layout="Etttt|m|L",
        mtp_num_layers=1,
    )

    def embedding_ranks(pipeline: list[int], _: int | None = None) -> list[int]:
        return ranks_with_embedding or pipeline

    def body() -> str:
        config = resolve(gpt_run("unused", model), device="cpu", world_size=3)
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=3,
            get_embedding_ranks=embedding_ranks if ranks_with_embedding else None,
        )
        found = "accepted"
        try:
            with ranks_of(config, "cpu"):
                pass
        except UsageError as error:
            found = str(error)
        # A rank must not exit while others still connect to it.
        torch.distributed.barrier()
        return found

    for found in run_ranks(3, body, timeout=120):
        if ranks_with_embedding == [0, 1]:  # The output layer is not tied.
            assert found == "accepted"
        else:
            assert "ranks [0, 1] hold the embedding's weight" in found


@pytest.mark.parametrize("present", [True, False])
def test_the_device_is_the_one_that_there_is(
    monkeypatch: pytest.MonkeyPatch, present: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    found = "cuda" if present else "cpu"
    missing: Any = "cpu" if present else "cuda"
    assert choose_device("auto") == found
    assert choose_device(found) == found
    with pytest.raises(ValueError, match=f"dist.device: '{missing}' was asked for"):
        choose_device(missing)
