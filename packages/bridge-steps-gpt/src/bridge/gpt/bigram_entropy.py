"""The bigram entropy: a baseline that predicts the next token from the previous one alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.training.contracts import SizedDataset
from bridge.training.usage_error import UsageError


def bigram_entropy(previous: NDArray[Any], following: NDArray[Any]) -> float:
    """Return the conditional entropy H(following | previous), in-sample, in nats per token.

    With c(a, b) the number of times that b followed a among N pairs and c(a) = sum_b c(a, b),
    it is -sum_ab c(a, b) / N * ln(c(a, b) / c(a)) (Cover and Thomas, Elements of Information
    Theory, equation 2.10). It is the loss of the best table of next-token probabilities, fitted on
    the same tokens that it is measured on. A model with a lower loss uses more than one token.

    Args:
        previous: Token ids, of any shape.
        following: The ids of the tokens after them, of the same shape.

    Raises:
        UsageError: The shapes differ, or there is no token.
    """
    if previous.shape != following.shape or previous.size == 0:
        raise UsageError(
            f"bigram entropy of shapes {previous.shape} and {following.shape}: "
            "as many tokens as successors are needed, and at least one"
        )
    first = previous.reshape(-1).astype(np.int64)
    width = int(following.max()) + 1
    codes = first * width + following.reshape(-1).astype(np.int64)
    pairs, pair_counts = np.unique(codes, return_counts=True)
    token_counts = np.bincount(first)
    surprise = np.log(token_counts[pairs // width] / pair_counts)
    return float(np.dot(pair_counts, surprise) / codes.size)


def bigram_entropy_of(dataset: SizedDataset) -> float:
    """Return the `bigram_entropy` of all samples of a GPT dataset, where the loss is not masked.

    Args:
        dataset: Samples are dicts of ``tokens``, ``labels`` and ``loss_mask``, each [sequence].
    """
    previous, following = [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        kept = np.asarray(sample["loss_mask"]) > 0
        previous.append(np.asarray(sample["tokens"])[kept])
        following.append(np.asarray(sample["labels"])[kept])
    if not previous:
        raise UsageError("bigram entropy of an empty dataset: at least one sample is needed")
    return bigram_entropy(np.concatenate(previous), np.concatenate(following))
