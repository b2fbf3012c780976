"""Lengths of samples: the longest, and those that the parallel layout needs."""

from collections.abc import Iterator
from math import lcm
from typing import TYPE_CHECKING

from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


def sample_length(config: "ConfigContainer") -> int:
    """Return the number of tokens of the longest sample.

    Raises:
        UsageError: The model has no seq_length.
    """
    length = getattr(config.model, "seq_length", None)
    if not isinstance(length, int) or length < 1:
        raise UsageError(f"model.seq_length={length}: samples are cut to it; give a number above 0")
    return length


def multiple_of_layout(config: "ConfigContainer", *, packed: bool) -> int:
    """Return a number of which the length of a microbatch, or packed document, is a multiple.

    Each context-parallel rank takes two chunks of a sequence, or of each document of a packed one.
    With sequence parallelism each tensor-parallel rank takes an equal part of that.
    """
    model = config.model
    if not isinstance(model, ModelParallelConfig):
        return 1
    context = model.context_parallel_size
    chunks = 2 * context if context > 1 else 1
    if packed or not model.sequence_parallel:
        return chunks
    return lcm(chunks, context * model.tensor_model_parallel_size)


def needs_equal_lengths(config: "ConfigContainer") -> bool:
    """Whether every microbatch of a step must have the same length.

    Ranks that hold different microbatches exchange activations in pipeline stages, which must know
    the shape to receive, and among experts. With ``model.variable_seq_lengths`` they send shapes.
    """
    model = config.model
    if not isinstance(model, ModelParallelConfig) or model.variable_seq_lengths:
        return False
    return model.pipeline_model_parallel_size > 1 or model.expert_model_parallel_size > 1


def packing_problems(config: "ConfigContainer") -> Iterator[str]:
    """Yield a line for each setting that contradicts packed sequences."""
    model, micro = config.model, config.train.micro_batch_size
    if micro != 1:
        yield (
            f"dataset.packing=true needs train.micro_batch_size=1, it is {micro}: a packed "
            "sequence is full by itself; raise model.seq_length for more"
        )
    if isinstance(model, TransformerConfig) and model.mtp_num_layers:
        yield (
            f"dataset.packing=true and model.mtp_num_layers={model.mtp_num_layers}: multi-token "
            "prediction does not support packed documents; leave one out"
        )
