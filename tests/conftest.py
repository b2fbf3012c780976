"""Settings for every test. Imports no member: their tests also run with one member installed."""

import os

# Two cores and several ranks a test: threads of one process only get in the others' way.
# Before torch is imported, and inherited by whatever a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of cores and one: ranks that wait for each other leave cores idle.

    xdist's own count takes two hyperthreads for one.
    """
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return min(cores + 1, 16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
