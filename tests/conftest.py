"""Settings for every test.

Imports none of the packages: the tests of state and peft also run with that package alone.
"""

import os
from importlib.util import find_spec

# Before torch is imported, and inherited by what a test starts. With several ranks a test on two
# cores, the threads of one process slow the others down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

IMPORT_MEGATRON_THEMSELVES = ("state", "workspace")
"""The folders whose tests start no ranks."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of cores plus one, as ranks that wait for each other leave cores idle.

    xdist's own count takes two hyperthreads for one.
    """
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return min(cores + 1, 16)


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Import megatron-core once, silently and fast, before test modules do.

    Imported in another way it compiles functions in whatever test runs later in the process.
    """
    is_alone = find_spec("bridge.training") is None  # bridge-peft
    if module_path.parent.name not in IMPORT_MEGATRON_THEMSELVES and not is_alone:
        from ranks import import_megatron_once

        import_megatron_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
