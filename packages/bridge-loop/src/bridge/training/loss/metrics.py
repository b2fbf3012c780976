"""Metrics with the way to reduce them, and the record of a microbatch.

Public as part of `bridge.training.loss_reduction`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from bridge.training.usage_error import UsageError

type Kind = Literal["token_mean", "mean", "total", "maximum", "local", "ratio"]
type Number = torch.Tensor | float


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's value on one microbatch of one rank, with the way to reduce it."""

    kind: Kind
    value: Number
    count: Number = 0.0
    """Denominator of a token mean or a ratio; unused by the others."""


def token_mean(loss_sum: Number, count: Number) -> Metric:
    """Declare a sum over tokens and their number: reduced to sum of sums / sum of counts."""
    return Metric("token_mean", _number(loss_sum), _number(count))


def mean(value: Number) -> Metric:
    """Declare a value that is averaged over microbatches and ranks with equal weights."""
    return Metric("mean", _number(value))


def total(value: Number) -> Metric:
    """Declare a value that is added over microbatches and ranks."""
    return Metric("total", _number(value))


def maximum(value: Number) -> Metric:
    """Declare a value whose maximum over microbatches and ranks is reported."""
    return Metric("maximum", _number(value))


def local(value: Number) -> Metric:
    """Declare a value of each rank's own, averaged over its microbatches.

    A rank without one, such as one of an earlier pipeline stage, gets that of the first rank that
    has one. So rank 0, which writes the log, has one under every layout.
    """
    return Metric("local", _number(value))


def ratio(value: Number, count: Number) -> Metric:
    """Declare a sum of values over a sum of counts, whatever the normalization of the loss."""
    return Metric("ratio", _number(value), _number(count))


def as_metric(key: str, value: Any) -> Metric:
    """Read a metric: a `Metric`, ``[sum, count]`` (token mean), or one number (mean).

    Raises:
        UsageError: It is none of these.
    """
    if isinstance(value, Metric):
        return value
    if isinstance(value, torch.Tensor) and value.shape == (2,) and not value.is_complex():
        return Metric("token_mean", value[0], value[1])
    try:
        return mean(value)
    except UsageError as error:
        raise UsageError(
            f"metric {key!r}: {error}; return a tensor [sum, count], one number, or token_mean(), "
            "mean(), total(), maximum() or local() of bridge.training.loss_reduction"
        ) from None


def snapshot(metric: Metric, device: torch.device) -> Metric:
    """Copy a metric to float64 on the device, so that no later change reaches it."""
    return Metric(metric.kind, _copy(metric.value, device), _copy(metric.count, device))


@dataclass(frozen=True, slots=True)
class MicrobatchRecord:
    """The metrics and loss of one microbatch, unreduced."""

    metrics: dict[str, Metric]
    loss: torch.Tensor
    """The loss that was optimized: a sum if there is a count, else a mean."""
    count: torch.Tensor | None
    """Tokens in the loss (int32 scalar); None for the pattern (loss, metrics)."""


def _number(value: Any) -> Number:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise UsageError(f"a tensor of shape {tuple(value.shape)} is not one number")
        return value
    if isinstance(value, int | float):
        return float(value)
    raise UsageError(f"a {type(value).__name__} is not one number")


def _copy(number: Number, device: torch.device) -> Number:
    if not isinstance(number, torch.Tensor):
        return number
    if number.device.type == "cpu" and device.type != "cpu":
        return float(number)
    return number.detach().reshape(()).to(torch.float64, copy=True)
