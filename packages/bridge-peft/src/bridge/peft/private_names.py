"""The seam to megatron-core: the private names of it that this package uses, and why."""

from typing import Any


def tensor_parallel_group(module: Any) -> Any:
    """Return the tensor-parallel group of one of megatron-core's Transformer Engine layers.

    The local layers have it as ``tp_group``, of these only some. No upstream issue known.
    """
    return module._tp_group
