"""Fixtures for the adapters' tests: megatron-core's process groups of one process, on the CPU."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(1)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Initialize megatron-core's process groups for this process alone."""
    # Not at the top: pytest loads this file before tests/conftest.py imports megatron-core.
    from megatron.core import parallel_state

    found = {name: value for name, value in vars(parallel_state).items() if name[:2] != "__"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    # megatron-core does not destroy all of its groups. A rank forked by a later test would free the
    # rest, and wait for their threads, which are not forked.
    for name, value in found.items():
        setattr(parallel_state, name, value)
