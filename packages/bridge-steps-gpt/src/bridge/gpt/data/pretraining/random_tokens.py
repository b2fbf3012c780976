"""Random tokens in place of data (dataset.mock), for measurements."""

import numpy as np
import torch

from bridge.gpt.data.tokenization.tokenizers import tokenizer_vocab_size
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.usage_error import UsageError

_TRAIN_SAMPLES = 10_000
"""Samples of one pass."""
_EVALUATION_SAMPLES = 64
"""Samples of a validation or test set."""


def random_splits(request: DataRequest, *, seq_length: int) -> DataSplits:
    """Return splits of random tokens, with the number of samples that the run asks for.

    Raises:
        UsageError: Neither the tokenizer nor the model has the number of tokens.
    """
    config = request.config
    if config.tokenizer is not None:
        vocabulary = tokenizer_vocab_size(config.tokenizer)
    else:
        vocabulary = getattr(config.model, "vocab_size", None) or 0
    if vocabulary < 1:
        raise UsageError(
            "dataset.mock=true: neither tokenizer nor model.vocab_size gives the number of "
            "tokens; set tokenizer.type=null tokenizer.vocab_size=N"
        )
    seed = config.rng.seed

    def build(split: int, samples: int | None, *, default: int) -> RandomTokens | None:
        if samples == 0:
            return None
        return RandomTokens(
            samples=default if samples is None else samples,
            seq_length=seq_length,
            vocab_size=vocabulary,
            seed=(seed, split),
        )

    train = build(0, request.train_samples, default=_TRAIN_SAMPLES)
    validation = build(1, request.validation_samples, default=_EVALUATION_SAMPLES)
    test = build(2, request.test_samples, default=_EVALUATION_SAMPLES)
    return DataSplits(
        train=train,
        validation=validation,
        test=test,
        shuffle=False,
        fingerprint=f"random tokens below {vocabulary}, seed {seed}",
        notes={"mock samples": sum(map(len, filter(None, (train, validation, test))))},
    )


class RandomTokens:
    """Samples of uniformly random tokens, each a function of the seed and its index alone."""

    def __init__(
        self, *, samples: int, seq_length: int, vocab_size: int, seed: tuple[int, int]
    ) -> None:
        self.samples = samples
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.seed = seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        generator = np.random.default_rng([*self.seed, index])
        text = torch.from_numpy(generator.integers(self.vocab_size, size=self.seq_length + 1))
        return {
            "tokens": text[:-1].contiguous(),
            "labels": text[1:].contiguous(),
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }
