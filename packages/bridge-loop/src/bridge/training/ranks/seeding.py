"""The random streams of a run: seed them by stage, save them, and restore the program's own."""

import contextlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bridge.training.ranks.groups import Ranks


def restore_random_streams_at_exit(stack: contextlib.ExitStack) -> None:
    """Restore the program's own random streams when the stack is closed."""
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    stack.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state())


def seed_all(seed: int) -> None:
    """Seed random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_stage(seed: int, ranks: Ranks) -> None:
    """Seed weights and dropout, with another seed for each pipeline stage."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed, groups = seed + 100 * ranks.model.stage, ranks.model.groups
    seed_all(stage_seed)
    model_parallel_cuda_manual_seed(
        stage_seed,
        tp_rank=groups.tp.rank(),
        ep_rank=groups.ep.rank(),
        etp_rank=groups.expt_tp.rank(),
        force_reset_rng=True,
    )


def random_state() -> dict[str, Any]:
    """Return the state of every random stream of this rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set every random stream of this rank to a state of `random_state`."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
