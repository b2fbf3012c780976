from types import SimpleNamespace
from typing import Any

import torch

from bridge.training.counters import CountSources, TokenCounter, TrainState

SEQUENCES = SimpleNamespace(seq_length=64)


class Sources:
    """Counts of the data and of the losses, over all ranks."""

    def __init__(self, *names: str) -> None:
        self.data = dict.fromkeys(names, 0)
        self.loss: int | None = None

    def take_data_counts(self) -> dict[str, int]:
        taken, self.data = self.data, dict.fromkeys(self.data, 0)
        return taken

    def take_loss_tokens(self) -> int | None:
        taken, self.loss = self.loss, None
        return taken

    def counter(self, model: Any) -> TokenCounter:
        return TokenCounter(
            TrainState(),
            model=model,
            flops_per_token=12.0,
            sources=CountSources(
                has_data_tokens="tokens" in self.data,
                take_data_counts=self.take_data_counts,
                take_loss_tokens=self.take_loss_tokens,
            ),
        )


def counted(counter: TokenCounter) -> tuple[int, float]:
    counters = counter._counters
    return counters.consumed_tokens, counters.floating_point_operations_so_far


def test_tokens_that_follow_from_the_samples_are_counted_with_the_step() -> None:
    counter = TokenCounter(TrainState(), model=SEQUENCES, flops_per_token=12.0)
    counter.add_step(8, has_metrics=True)
    counter.add_step(8, has_metrics=True)
    assert counted(counter) == (1024, 1024 * 12.0)
    counter.gather()
    assert counter.take_interval() == {"tokens": 1024}
    assert counter.take_interval() == {"tokens": 0}


def test_tokens_that_the_data_counts_go_before_the_sequence_length() -> None:
    sources = Sources("tokens", "images")
    counter = sources.counter(SEQUENCES)
    counter.add_step(8, has_metrics=True)
    assert counted(counter) == (0, 0.0)
    sources.data = {"tokens": 300, "images": 2}
    counter.gather()
    counter.add_step(8, has_metrics=True)
    sources.data = {"tokens": 400, "images": 1}
    counter.gather(is_reduced=True)
    assert counted(counter) == (700, 700 * 12.0)
    assert counter.take_interval() == {"tokens": 700, "images": 3}


def test_tokens_of_losses_come_from_reductions_and_from_what_was_not_reduced() -> None:
    sources = Sources("images")
    counter = sources.counter(object())
    for tokens in (20, 30):
        counter.add_step(8, has_metrics=True, reduced=torch.tensor([2.0, tokens]))
    counter.add_step(8, has_metrics=False)
    assert counted(counter) == (8, 8 * 12.0)
    counter.add_step(8, has_metrics=True)
    sources.loss = 5
    counter.gather()
    assert counted(counter) == (63, 63 * 12.0)


def test_where_nobody_counts_tokens_they_are_the_samples() -> None:
    sources = Sources()
    counter = sources.counter(object())
    counter.add_step(8, has_metrics=True, reduced=torch.tensor([0.0, 0.0]))
    counter.gather(is_reduced=True)
    assert counted(counter) == (8, 8 * 12.0)
