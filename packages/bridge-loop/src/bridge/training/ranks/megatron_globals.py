"""megatron-core's global variables, restored after a run.

A run sets them to its own values. The program around it may have set them before, or may build
another model afterwards.
"""

import contextlib
import os
from collections.abc import Iterator

from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import process_globals

_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""A language model sets these for Transformer Engine, and rejects other values."""


@contextlib.contextmanager
def restored_globals() -> Iterator[None]:
    """Restore megatron-core's globals at the end: groups, calculators, streams, caches."""
    with quiet_import():
        from megatron.core.models.common.embeddings import rotary_pos_embedding as rotary
        from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

        values = [(owner, name, getattr(owner, name)) for owner, name in process_globals()]
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        for owner, name, value in values:
            setattr(owner, name, value)
        for name, text in variables.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text
        # They keep every module that they were called on, whose hooks refer to the model.
        rotary.RotaryEmbedding.forward.cache_clear()
        yarn.YarnRotaryEmbedding.forward.cache_clear()
