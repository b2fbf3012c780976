"""Torch's deterministic algorithms, for the time of a run."""

import contextlib
from collections.abc import Iterator

import torch

from bridge.training.config import ConfigContainer, TransformerConfig
from bridge.training.config.schema.paths import parts_of


@contextlib.contextmanager
def deterministic_algorithms(config: ConfigContainer) -> Iterator[None]:
    """Use them within the block where a transformer of the model has deterministic_mode.

    An operation that has none raises a RuntimeError, of torch's.
    """
    parts = [part for _, part in parts_of(config.model, "model")]
    if not any(isinstance(part, TransformerConfig) and part.deterministic_mode for part in parts):
        yield
        return
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
