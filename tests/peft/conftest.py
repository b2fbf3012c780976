"""What the adapters' tests share: megatron-core with one process, on the CPU."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state


def pytest_configure(config: pytest.Config) -> None:
    """Let megatron-core warn; whatever else warns fails the test."""
    config.addinivalue_line("filterwarnings", r"ignore:::megatron\.")


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(1)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Megatron-core's process groups, of this process alone."""
    found = {name: value for name, value in vars(parallel_state).items() if name[:2] != "__"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    # megatron-core forgets some groups. A rank that a later test forks would free them, and wait
    # for threads of theirs that were not forked.
    for name, value in found.items():
        setattr(parallel_state, name, value)
