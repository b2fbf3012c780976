"""The CPU emulation: megatron-core's CUDA code on CPU tensors, with gloo between the ranks.

While it is active, the functions that megatron-core calls on a GPU (`bridge.training.cpu.patches`)
do the same on the CPU. So the schedules, DDP, optimizers and checkpoints of a run are
megatron-core's own. Almost all replaced functions would raise without a GPU. Five differences are
visible to code that works on a CPU anyway:

- ``F.dropout`` draws from the emulated generator of the device;
- ``torch.manual_seed`` seeds that generator too, as on a GPU;
- ``Tensor.type()`` returns ``torch.cuda.*`` when megatron-core's optimizer calls it;
- megatron-core's Adam is `bridge.training.cpu.adam.FusedAdam`;
- gloo's groups share a device.

The emulation is entered explicitly, never by detection, and is rejected where a GPU is visible. A
run that passes here shows nothing about stream races, GPU memory, Transformer Engine's numerics or
NCCL.
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
    """Whether the emulation is active in this process."""
    return bool(_undo)


def enable() -> None:
    """Start the emulation for this process; a second call does nothing.

    Raises:
        RuntimeError: A GPU is visible.
    """
    if _undo:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "a GPU is visible and the CPU emulation does not hide it; "
            "set dist.device=cpu, or CUDA_VISIBLE_DEVICES= before torch is imported"
        )
    # The list is complete before the first replacement: entries wrap the original functions.
    for owner, name, replacement in list(table()):
        _undo.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, replacement)
    logger.info("CPU emulation: megatron-core's CUDA calls run on the CPU, over gloo")


def disable() -> None:
    """End the emulation, and put everything back as it was."""
    while _undo:
        owner, name, original = _undo.pop()
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def cpu_training() -> Iterator[None]:
    """Emulate in this block; inside another such block this does nothing."""
    if is_active():
        yield
        return
    enable()
    try:
        yield
    finally:
        disable()
