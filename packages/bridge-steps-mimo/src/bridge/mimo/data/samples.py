"""Samples of text with images, or items of other modalities, in it.

A sample is a dict:

- ``input_ids``, ``labels``, ``loss_mask`` and ``position_ids``, each [sequence];
- ``items``: ``{modality: {argument: [items, ...]}}``, the arguments of the modality's encoder. A
  sample without images has no entry for them, or 0 items. On a rank that loads no items of a
  modality only their number matters (`bridge.mimo.data.rank_images`);
- ``length``: the number of tokens before its padding; all of them if it is absent.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from bridge.training.usage_error import UsageError

TOKEN_KEYS = ("input_ids", "labels", "loss_mask", "position_ids")
"""The tensors of a sample that have a value for each token."""


def make_next_token_sample(
    tokens: Sequence[int],
    *,
    counted: Collection[int],
    seq_length: int,
    padding: int,
    items: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """Make a sample whose loss counts some of the tokens, predicted from those before them.

    Args:
        tokens: The text, with a special token for each embedding.
        counted: Positions in `tokens`, from 1 on, whose predictions count.
        seq_length: Length of the sample; one less than that of the longest text.
        padding: The token after the text.
        items: The encoders' arguments, by modality.

    Raises:
        UsageError: The text is too long, or the first token is to be predicted.
    """
    if not 2 <= len(tokens) <= seq_length + 1:
        raise UsageError(
            f"model.language.seq_length={seq_length}: a sample has {len(tokens)} tokens; give it "
            f"2 to {seq_length + 1}"
        )
    if not all(1 <= position < len(tokens) for position in counted):
        raise UsageError(
            f"counted={sorted(counted)}: must be positions from 1 to {len(tokens) - 1}; change them"
        )
    text = torch.tensor(tokens, dtype=torch.int64)
    input_ids = torch.full((seq_length,), padding, dtype=torch.int64)
    input_ids[: len(text) - 1] = text[:-1]
    # A special token need not be in the vocabulary, so it is no label.
    labels = torch.zeros(seq_length, dtype=torch.int64)
    loss_mask = torch.zeros(seq_length)
    targets = torch.tensor(sorted(counted), dtype=torch.int64)
    labels[targets - 1] = text[targets]
    loss_mask[targets - 1] = 1.0
    return {
        "input_ids": input_ids,
        "labels": labels,
        "loss_mask": loss_mask,
        "position_ids": torch.arange(seq_length),
        "length": len(text) - 1,
        "items": dict(items or {}),
    }


def find_padding_token(special_token_ids: Collection[int]) -> int:
    """Return the smallest token that is not special."""
    return next(token for token in itertools.count() if token not in special_token_ids)


def measure_sample(sample: Mapping[str, Any], index: int) -> int:
    """Return the number of tokens of a sample before its padding.

    Args:
        sample: A sample (see the module's docstring).
        index: Its number within the microbatch, for the message.

    Raises:
        UsageError: Its tensors have different lengths, or ``length`` is beyond them.
    """
    if missing := [key for key in TOKEN_KEYS if key not in sample]:
        raise UsageError(
            f"sample {index} of a microbatch has no {' and no '.join(missing)}; give "
            f"{', '.join(TOKEN_KEYS)}"
        )
    shapes = {key: tuple(sample[key].shape) for key in TOKEN_KEYS}
    if len(set(shapes.values())) > 1 or len(shapes["input_ids"]) != 1:
        found = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
        raise UsageError(
            f"sample {index} of a microbatch has tensors of the shapes {found}; give all of them "
            "one shape, [sequence]"
        )
    (tokens,) = shapes["input_ids"]
    length = int(sample.get("length", tokens))
    if not 1 <= length <= tokens:
        raise UsageError(
            f"sample {index} of a microbatch: length={length} of {tokens} tokens; give the number "
            f"of tokens before the padding, from 1 to {tokens}"
        )
    return length
