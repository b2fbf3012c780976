"""torch's deterministic algorithms during a run."""

import contextlib
from collections.abc import Iterator

import torch

from bridge.training.config import ConfigContainer, TransformerConfig
from bridge.training.config.schema.fields import parts_of


@contextlib.contextmanager
def deterministic_algorithms(config: ConfigContainer) -> Iterator[None]:
    """Use deterministic algorithms in the block if a transformer has deterministic_mode.

    An operation without such an algorithm raises torch's RuntimeError.
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
