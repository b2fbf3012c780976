"""The reduction of metrics: their declarations, and the reducer (`bridge.training.loss`)."""

from bridge.training.loss.metrics import (
    Metric,
    MicrobatchRecord,
    as_metric,
    local,
    maximum,
    mean,
    snapshot,
    token_mean,
    total,
)
from bridge.training.loss.reduced import ReducedMetrics
from bridge.training.loss.reducer import MetricReducer

__all__ = [
    "Metric",
    "MetricReducer",
    "MicrobatchRecord",
    "ReducedMetrics",
    "as_metric",
    "local",
    "maximum",
    "mean",
    "snapshot",
    "token_mean",
    "total",
]
