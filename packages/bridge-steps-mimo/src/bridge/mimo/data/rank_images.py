"""The images that a rank loads: those of its samples, where their encoder begins on it.

The loop draws the samples of a rank (`bridge.training.contracts.DataShard`). Of these the rank
loads the images if it holds the first stage of their encoder. Elsewhere their number counts alone:
it says how many tokens stand for them.
"""

import torch

from bridge.training.contracts import DataRequest


def should_load_images(request: DataRequest, modality: str) -> bool:
    """Whether this rank loads the items of a modality."""
    return request.modules is None or modality in request.modules


def make_unloaded_images(number: int) -> dict[str, torch.Tensor]:
    """Return the items of a sample on a rank that does not load them: their number alone."""
    return {"nothing": torch.empty(number, 0)}
