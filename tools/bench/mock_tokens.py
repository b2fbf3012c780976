"""The random tokens of our ``dataset.mock=true``, for the side that does not have our datasets."""

from typing import override

import numpy as np
import torch


class RandomTokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples of uniformly random tokens, each a function of the seed and its index alone.

    Args:
        samples: Number of samples.
        seq_length: Tokens of a sample.
        vocab_size: Tokens are below this.
        seed: The run's seed.
    """

    def __init__(self, *, samples: int, seq_length: int, vocab_size: int, seed: int) -> None:
        self.samples = samples
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.seed = seed
        self.loss_mask = torch.ones(seq_length)
        self.position_ids = torch.arange(seq_length)

    def __len__(self) -> int:
        return self.samples

    @override
    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        # 0 is the training split.
        generator = np.random.default_rng([self.seed, 0, index])
        text = torch.from_numpy(generator.integers(self.vocab_size, size=self.seq_length + 1))
        return {
            "tokens": text[:-1].contiguous(),
            "labels": text[1:].contiguous(),
            "loss_mask": self.loss_mask,
            "position_ids": self.position_ids,
        }
