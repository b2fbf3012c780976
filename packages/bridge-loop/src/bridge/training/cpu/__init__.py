"""Run megatron-core's CUDA code on CPU tensors, with gloo between the ranks.

While active, a table of functions that megatron-core calls on a GPU does the same on the CPU, so
the schedules, DDP, optimizers and checkpoints of a run are megatron-core's own. Almost every
replaced call would raise without a GPU. Working CPU code sees five differences:
``F.dropout`` draws from the stand-in for the device's generator, ``torch.manual_seed`` seeds that
one too (as on a GPU), ``Tensor.type()`` says ``torch.cuda.*`` to megatron-core's optimizer alone,
megatron-core's Adam is `bridge.training.cpu.adam.FusedAdam`, and gloo's groups share a device.

Entered explicitly, never detected; refused where a GPU is visible. A run that passes here says
nothing about stream races, GPU memory, Transformer Engine's numerics or NCCL.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch

from bridge.training.cpu.patches import Patch, table

logger = logging.getLogger(__name__)

_MISSING = object()
_undo: list[Patch] = []


def is_active() -> bool:
    """Say whether the stand-in is in place."""
    return bool(_undo)


def enable() -> None:
    """Put the stand-in in place for this process; a second call does nothing.

    Raises:
        RuntimeError: A GPU is visible.
    """
    if _undo:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "a GPU is visible and the CPU stand-in does not hide it; "
            "set dist.device=cpu, or CUDA_VISIBLE_DEVICES= before torch is imported"
        )
    # The list is complete before the first replacement: later ones wrap what is there now.
    for owner, name, replacement in list(table()):
        _undo.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, replacement)
    logger.info("CPU rehearsal: megatron-core's CUDA calls run on the CPU, over gloo")


def disable() -> None:
    """Take the stand-in away again and leave everything as it was."""
    while _undo:
        owner, name, original = _undo.pop()
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def cpu_training() -> Iterator[None]:
    """Enter the stand-in for a block; inside another such block this does nothing."""
    if is_active():
        yield
        return
    enable()
    try:
        yield
    finally:
        disable()
