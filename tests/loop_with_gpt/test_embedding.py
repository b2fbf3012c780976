"""A GPT trained inside another program leaves nothing of megatron-core behind."""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bridge.training import cpu
from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from gpt_models import tiny_gpt
from process_footprint import take_footprint
from ranks import run_ranks
from training_runs import TokenData, gpt_run, series

MODEL: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_token_dispatcher_type": "alltoall",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "mtp_num_layers": 1,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
}


def test_a_gpt_leaves_nothing_behind_and_the_next_one_trains_alike(tmp_path: Path) -> None:
    """Trackers, caches, environment variables: a language model has more of them than a module."""

    def train(directory: Path) -> None:
        config = gpt_run(directory, tiny_gpt(**MODEL), dataset=TokenData(validation=4))
        config.train.train_iters = 2
        config.checkpoint.save_at_end = True
        pretrain(config, forward_step)

    def body() -> None:
        os.chdir(tempfile.mkdtemp())
        tempfile.tempdir = tempfile.mkdtemp()
        cpu.disable()
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        before = take_footprint()
        train(tmp_path / "first")
        imported = take_footprint()
        train(tmp_path / "second")
        after = take_footprint()
        assert imported.changes_until(after) == {}
        # Importing megatron-core's modules changes torch and the interpreter, once.
        assert before.rest["environment"] == after.rest["environment"]
        for name in ("process groups", "random streams", "threads", "descriptors", "files"):
            assert before.rest[name] == after.rest[name], name
        dist.barrier()

    run_ranks(2, body, timeout=120)
    losses = series(tmp_path / "first", "lm loss")
    assert len(losses) == 2
    assert losses == series(tmp_path / "second", "lm loss")
