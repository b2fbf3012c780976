"""Samples as `bridge.training.gpt_step` takes them: alone, or several packed into a sequence.

Position i of a sample holds token i and predicts token i + 1. Padding is at the end, with labels
that do not count. Attention is causal, so no real token sees it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.gpt.data.sft.corpus import Corpus

type Sample = dict[str, torch.Tensor]


def round_up(length: int, multiple: int) -> int:
    """Return the smallest multiple that is not below `length`."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class SingleSamples:
    """Samples of the corpus, each of its own length; `PaddedBatch` makes microbatches of them."""

    corpus: Corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int, /) -> Sample:
        return _sample(*self.corpus[index])


@dataclass(frozen=True, kw_only=True)
class PackedSamples:
    """Sequences of several samples of the corpus, as documents that do not see each other.

    Every document begins at position 0, is padded to a multiple and has its boundaries in
    ``cu_seqlens``. The rest of the sequence is a last document of padding.
    """

    corpus: Corpus
    plan: Sequence[Sequence[int]]
    """The samples of each sequence."""
    length: int
    """Tokens of a sequence."""
    multiple: int
    """The length of every document is a multiple of it."""
    padding: int
    """The token of padding."""

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int, /) -> Sample:
        # Filled in place, because a sequence has hundreds of short rows: making tensors for each
        # would take longer than training on the sequence.
        tokens = np.full(self.length, self.padding, np.int64)
        labels = tokens.copy()
        loss_mask = np.zeros(self.length, np.float32)
        padding_mask = np.ones(self.length, np.bool_)
        ends = [0]
        for number in self.plan[index]:
            ids, counts = self.corpus[number]
            real = slice(ends[-1], ends[-1] + len(ids) - 1)
            tokens[real], labels[real] = ids[:-1], ids[1:]
            loss_mask[real], padding_mask[real] = counts[1:], False
            ends.append(ends[-1] + round_up(len(ids) - 1, self.multiple))
        if ends[-1] < self.length:
            ends.append(self.length)
        starts = np.repeat(ends[:-1], np.diff(ends))
        sample = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": np.arange(self.length) - starts,
            "padding_mask": padding_mask,
            "cu_seqlens": np.array(ends, np.int32),
        }
        return {name: torch.from_numpy(values) for name, values in sample.items()}


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Makes a microbatch of samples of different lengths."""

    multiple: int
    """The length is a multiple of it."""
    padding: int
    """The token of padding."""
    length: int | None = None
    """The length of every microbatch. If None, the longest sample's, rounded up."""

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        """Pad and stack samples: [batch, sequence]."""
        longest = max(len(sample["tokens"]) for sample in samples)
        length = self.length or round_up(longest, self.multiple)
        padded = [_padded(sample, length, self.padding) for sample in samples]
        return {name: torch.stack([p[name] for p in padded]) for name in padded[0]}


def count_tokens(microbatch: Sample) -> int:
    """Return the number of tokens of a microbatch, prompts included and padding not."""
    return int((~microbatch["padding_mask"]).sum())


def _sample(ids: NDArray[np.int32], counts: NDArray[np.bool_]) -> Sample:
    text = torch.from_numpy(ids.astype(np.int64))
    return {
        "tokens": text[:-1],
        "labels": text[1:],
        "loss_mask": torch.from_numpy(counts[1:].astype(np.float32)),
        "position_ids": torch.arange(len(text) - 1),
        "padding_mask": torch.zeros(len(text) - 1, dtype=torch.bool),
    }


def _padded(sample: Sample, length: int, padding: int) -> Sample:
    missing = length - len(sample["tokens"])
    fills: dict[str, Any] = {
        "tokens": padding,
        "labels": padding,
        "loss_mask": 0.0,
        "padding_mask": True,
    }
    padded = {
        name: torch.nn.functional.pad(sample[name], (0, missing), value=fill)
        for name, fill in fills.items()
    }
    return padded | {"position_ids": torch.arange(length)}
