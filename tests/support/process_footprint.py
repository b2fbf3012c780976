"""The state of this process: everything that a library could leave changed in it."""

import gc
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bridge.training import cpu
from bridge.training.ranks.stop_request import STOP_SIGNALS

_COUNTERS = {
    # Counters of torch that only grow.
    "torch.distributed.distributed_c10d._group_count",
    "torch.utils.hooks.RemovableHandle.next_id",
}
_SCALARS = (bool, int, float, str, tuple, type(None))


@dataclass
class Footprint:
    """The state of this process that a run could change, by name."""

    globals: dict[str, Any]
    """Attributes of the modules of torch and megatron-core, and of their classes."""
    rest: dict[str, Any]

    def changes_until(self, later: "Footprint") -> dict[str, Any]:
        """Return the differences to a later footprint: before and after, by name."""
        found = {
            name: (value, later.rest[name])
            for name, value in self.rest.items()
            if value != later.rest[name]
        }
        # Modules imported meanwhile stay imported, with the warnings that they have given.
        modules = {name for name in self.globals if name.endswith(".__name__")}
        for name, value in later.globals.items():
            owner, _, attribute = name.rpartition(".")
            if name in self.globals:
                if not _is_same(self.globals[name], value):
                    found[name] = (self.globals[name], value)
            elif f"{owner}.__name__" in modules and not (
                isinstance(value, types.ModuleType) or attribute == "__warningregistry__"
            ):
                found[name] = ("absent", value)
        found |= {n: (self.globals[n], "absent") for n in self.globals if n not in later.globals}
        return {name: change for name, change in found.items() if name not in _COUNTERS}


def take_footprint() -> Footprint:
    """Return the state of this process, after its garbage is collected."""
    # A parameter that C++ refers to outlives a collection, with what it refers to.
    while gc.collect():
        pass
    return Footprint(globals=dict(_globals()), rest=_rest())


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, _SCALARS) and type(one) is type(other) and one == other)


def _globals() -> Iterator[tuple[str, Any]]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("torch", "megatron"):
            continue
        # Not every entry is a module: torch has lazy ones, which would load the real ones.
        if type(module) is not types.ModuleType:
            continue
        for attribute, value in list(vars(module).items()):
            yield f"{name}.{attribute}", value
            if type(value) is type and value.__module__ == name:
                for inner, content in list(vars(value).items()):
                    yield f"{name}.{attribute}.{inner}", content


def _rest() -> dict[str, Any]:
    loggers = logging.Logger.manager.loggerDict
    return {
        "process groups": (dist.is_initialized(), len(dist.distributed_c10d._world.pg_map)),
        "CPU emulation": cpu.is_active(),
        "random streams": (
            random.getstate(),
            [str(part) for part in np.random.get_state()],
            torch.get_rng_state().tolist(),
            torch.cuda.get_rng_state().tolist() if cpu.is_active() else None,
        ),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in STOP_SIGNALS],
        "warnings": list(warnings.filters),
        "root logger": (logging.root.level, list(logging.root.handlers), logging.root.filters[:]),
        "loggers": {
            name: (logger.level, logger.disabled, logger.handlers[:], logger.filters[:])
            for name, logger in loggers.items()
            if isinstance(logger, logging.Logger)
            and (logger.level or logger.disabled or logger.handlers or logger.filters)
        },
        "garbage collection": (gc.isenabled(), gc.get_threshold(), gc.callbacks[:]),
        "torch": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
        ),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.path[:]),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "hidden modules": sorted(name for name, module in sys.modules.items() if module is None),
        # Counted by the kernel, since Python does not know gloo's threads and sockets.
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "files": sorted(os.listdir()),
        "temporary files": sorted(os.listdir(tempfile.gettempdir())),
    }
