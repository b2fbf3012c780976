"""Packing: the samples of a microbatch in one row, without padding between them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from bridge.mimo.data.samples import TOKEN_KEYS, measure_sample
from bridge.training.usage_error import UsageError


def pack(
    samples: Sequence[Mapping[str, Any]], *, multiple_of: int = 1, padding: int = 0
) -> dict[str, Any]:
    """Put samples into one row, without their padding; none of them attends to another.

    Args:
        samples: Samples (see `bridge.mimo.data.samples`).
        multiple_of: The row is padded to a multiple of this, with a sample that is not counted.
        padding: The token of that sample.

    Returns:
        ``input_ids``, ``labels``, ``loss_mask`` and ``position_ids``, each [1, tokens], and
        ``packing_kwargs``, megatron-core's boundaries of the samples.

    Raises:
        UsageError: There is no sample, or the tensors of one do not have the same length.
    """
    if not samples or multiple_of < 1:
        raise UsageError(
            f"pack: {len(samples)} samples and multiple_of={multiple_of}; give at least 1 of each"
        )
    lengths = [measure_sample(sample, index) for index, sample in enumerate(samples)]
    missing = -sum(lengths) % multiple_of
    row: dict[str, Any] = {
        key: functional.pad(
            torch.cat(
                [sample[key][:length] for sample, length in zip(samples, lengths, strict=True)]
            ),
            (0, missing),
            value=padding if key == "input_ids" else 0,
        )[None]
        for key in TOKEN_KEYS
    }
    if missing:
        lengths.append(missing)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    row["packing_kwargs"] = {
        "cu_seqlens_q": ends,
        "cu_seqlens_kv": ends,
        "max_seqlen_q": max(lengths),
        "max_seqlen_kv": max(lengths),
    }
    return row
