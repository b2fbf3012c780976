"""What megatron-core keeps for the whole process, given back as it was found.

A run sets these to its own values. The program around it may have set them before, or builds
another model after it.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from bridge.training.megatron_import import quiet_import

_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""A language model sets these for Transformer Engine, and is not built where they differ."""


@contextlib.contextmanager
def globals_kept() -> Iterator[None]:
    """Put megatron-core's globals back at the end: groups, calculators, streams, caches."""
    with quiet_import():
        from megatron.core.models.common.embeddings import rotary_pos_embedding as rotary
        from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    values = [(owner, name, getattr(owner, name)) for owner, name in _places()]
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
        # They remember every module that they were called on, and its hooks lead to all of a model.
        rotary.RotaryEmbedding.forward.cache_clear()
        yarn.YarnRotaryEmbedding.forward.cache_clear()


def _places() -> Iterator[tuple[Any, str]]:
    with quiet_import():
        from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer import multi_token_prediction
        from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Its own function that takes the groups down forgets some, and schedules set the virtual stage.
    for name in vars(parallel_state):
        if name.startswith("_") and not name.startswith("__"):
            yield parallel_state, name
    yield num_microbatches_calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR"
    yield rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE"
    yield random, "_CUDA_RNG_STATE_TRACKER"
    yield random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED"
    yield moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale"
    yield multi_token_prediction.MTPLossAutoScaler, "main_loss_backward_scale"
    yield token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream"
