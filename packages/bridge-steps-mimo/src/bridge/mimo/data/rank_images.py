"""The images that a rank loads: those of its samples, where it holds their encoder's first stage.

The loop draws the samples of a rank (`bridge.training.contracts.DataShard`). A rank without the
first stage of an encoder loads none of its images. Its samples hold only the number of images,
which must match the number of special tokens.
"""

import torch

from bridge.training.contracts import DataRequest


def should_load_images(request: DataRequest, modality: str) -> bool:
    """Whether this rank loads the items of a modality."""
    return request.modules is None or modality in request.modules


def make_unloaded_images(number: int) -> dict[str, torch.Tensor]:
    """Return the items of a sample on a rank that does not load them: their number alone."""
    return {"nothing": torch.empty(number, 0)}
