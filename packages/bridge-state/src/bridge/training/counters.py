"""The counters of a run: how far it has come, and its tokens and FLOPs, each counted once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from bridge.training.contracts import TOKENS
from bridge.training.usage_error import UsageError


@dataclass(kw_only=True)
class TrainState:
    """The counters of a run, saved with every checkpoint. Counts are over all ranks."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_train_samples: int = 0
    """Training samples drawn; the position in the data."""
    skipped_train_samples: int = 0
    """Those of them whose step was skipped."""
    consumed_validation_samples: int = 0
    """Validation samples evaluated, over all evaluations."""
    consumed_tokens: int = 0
    """Tokens trained on (`TokenCounter`). Where the data or the loss function counts them, the
    steps since the newest that was logged or saved are not in it yet."""
    floating_point_operations_so_far: float = 0.0
    """Model FLOPs of the consumed tokens."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return each counter as a 0-dim CPU tensor: int64, the FLOPs float64."""
        return {
            field.name: torch.tensor(getattr(self, field.name), dtype=_dtype(field.name))
            for field in fields(self)
        }

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take over the counters of `state_dict`.

        Raises:
            UsageError: A counter is missing, unknown, or of a type that has lost precision.
        """
        names = {field.name for field in fields(self)}
        if state_dict.keys() != names:
            raise UsageError(
                "the saved train state does not fit: "
                f"missing {sorted(names - state_dict.keys())}, "
                f"unknown {sorted(state_dict.keys() - names)}"
            )
        for name, value in state_dict.items():
            if value.dtype != _dtype(name):
                raise UsageError(f"train state {name} is {value.dtype}, not {_dtype(name)}")
        for name, value in state_dict.items():
            setattr(self, name, value.item())


@dataclass(kw_only=True, frozen=True)
class CountSources:
    """The sources of the counts that the host does not know when a step is taken."""

    has_data_tokens: bool
    """Whether the data counts tokens (`DataSplits.items`)."""
    take_data_counts: Callable[[], Mapping[str, int]]
    """Return what the data counted since the last call, over all ranks; a collective."""
    take_loss_tokens: Callable[[], int | None]
    """Return the tokens in losses that no reduction has included yet, over all ranks; a collective.

    None if the loss functions count none."""


class TokenCounter:
    """Counts the tokens and the model FLOPs of a run's steps.

    The tokens of a run are

        those that its data counts (`DataSplits.items`), else
        model.seq_length of each sample, padding included, else
        those that the loss function returns as num_tokens, else
        its samples.

    Sequence lengths are known when a step is taken, and the counters advance with it. Tokens that
    the data or the loss function counts are spread over the ranks: their steps are open until
    `gather`.
    """

    def __init__(
        self,
        counters: TrainState,
        *,
        model: Any,
        flops_per_token: float | None = None,
        sources: CountSources | None = None,
    ) -> None:
        """Count into `counters`.

        Args:
            counters: The run's counters.
            model: The model section; its ``seq_length``, if it has one, is the tokens of a sample.
            flops_per_token: Of forward and backward; None where they are not known.
            sources: None where nothing but the samples and the sequence length is known.
        """
        self._counters = counters
        self._sequence_length = int(getattr(model, "seq_length", None) or 0)
        self._sources = sources
        self.flops_per_token = flops_per_token
        self._open_samples = 0
        # [number of counting ranks, tokens] of the open steps that were reduced, on the device.
        self._reduced: torch.Tensor | None = None
        self._interval: dict[str, int] = {}

    def add_step(
        self, samples: int, *, has_metrics: bool, reduced: torch.Tensor | None = None
    ) -> None:
        """Count a step; no collective, no host-device sync.

        Args:
            samples: Samples of the step, over all ranks.
            has_metrics: Whether the step's metrics went to a reducer, with the tokens of its loss.
            reduced: `ReducedMetrics.token_count` of a reduction after this step.
        """
        has_data_tokens = self._sources is not None and self._sources.has_data_tokens
        if self._sequence_length and not has_data_tokens:
            self._add(samples * self._sequence_length)
        elif self._sources is None or not (has_data_tokens or has_metrics):
            self._add(samples)
        else:
            self._open_samples += samples
            if reduced is not None:
                self._reduced = reduced if self._reduced is None else self._reduced + reduced

    def gather(self, *, is_reduced: bool = False) -> None:
        """Count the open steps, over all ranks; a collective that waits for the device.

        Args:
            is_reduced: Whether the metrics of the newest step were reduced: then no rank has
                tokens that `add_step` did not get.
        """
        sources = self._sources
        if sources is None:
            return
        counts = dict(sources.take_data_counts())
        tokens = counts.pop(TOKENS, None)
        if not self._sequence_length and not sources.has_data_tokens:
            tokens = self._take_loss_tokens(None if is_reduced else sources.take_loss_tokens())
        self._add(self._open_samples if tokens is None else tokens)
        self._open_samples = 0
        for name, number in counts.items():
            self._interval[name] = self._interval.get(name, 0) + number

    def take_interval(self) -> dict[str, int]:
        """Return the counts since the last call by name, always with "tokens"."""
        interval, self._interval = self._interval, {}
        return {TOKENS: 0} | interval

    def _take_loss_tokens(self, unreduced: int | None) -> int | None:
        counted, tokens = (0.0, 0.0) if self._reduced is None else self._reduced.tolist()
        self._reduced = None
        if not counted and unreduced is None:
            return None
        return int(tokens) + (unreduced or 0)

    def _add(self, tokens: int) -> None:
        self._counters.consumed_tokens += tokens
        self._counters.floating_point_operations_so_far += tokens * (self.flops_per_token or 0.0)
        self._interval[TOKENS] = self._interval.get(TOKENS, 0) + tokens


def _dtype(name: str) -> torch.dtype:
    return torch.float64 if name == "floating_point_operations_so_far" else torch.int64
