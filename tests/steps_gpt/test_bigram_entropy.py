import math
from collections import Counter

import numpy as np
import pytest
import torch

from bridge.gpt.bigram_entropy import bigram_entropy, bigram_entropy_of


def brute_force(pairs: list[tuple[int, int]]) -> float:
    both, first = Counter(pairs), Counter(a for a, _ in pairs)
    return sum(-math.log(both[a, b] / first[a]) for a, b in pairs) / len(pairs)


def test_entropy_equals_the_mean_surprise_counted_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    previous = rng.integers(0, 300, size=(7, 400))
    following = (previous * 3 + rng.integers(0, 5, size=previous.shape)) % 70_000
    pairs = list(zip(previous.reshape(-1).tolist(), following.reshape(-1).tolist(), strict=True))
    assert bigram_entropy(previous, following) == pytest.approx(brute_force(pairs), rel=1e-12)


def test_a_certain_successor_has_entropy_zero_and_a_coin_has_ln_two() -> None:
    steady = np.array([1, 2, 3, 1, 2, 3], dtype=np.uint16)
    assert bigram_entropy(steady[:-1], steady[1:]) == 0.0
    previous, following = np.zeros(4, dtype=int), np.array([0, 1, 0, 1])
    assert bigram_entropy(previous, following) == pytest.approx(math.log(2))


class _Samples:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        text = torch.tensor([[1, 2, 1, 3, 9], [1, 2, 2, 3, 3]][index])
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.tensor([1.0, 1.0, 1.0, 0.0]),
        }


def test_a_dataset_is_measured_where_its_loss_is_not_masked() -> None:
    pairs = [(1, 2), (2, 1), (1, 3), (1, 2), (2, 2), (2, 3)]
    assert bigram_entropy_of(_Samples()) == pytest.approx(brute_force(pairs))


def test_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bigram_entropy(np.array([], dtype=int), np.array([], dtype=int))
