"""The unsharded gradients of a model that is spread over ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from bridge.training.model.initial_weights import shards_of_parameters

type Gradients = dict[str, torch.Tensor]
"""By the parameter's name in a checkpoint."""


def unsharded_gradients(
    model: list[Any], groups: ProcessGroupCollection, gradient_of: Callable[[Any], torch.Tensor]
) -> Gradients:
    """Put every parameter's gradient together from all ranks, by the names of a checkpoint."""
    pieces = []
    for chunk in model:
        for parameter, shards in shards_of_parameters(unwrap_model(chunk), groups):
            # The position of shards is known for parameters only, so gradients take their place.
            kept = parameter.detach().clone()
            parameter.data.copy_(gradient_of(parameter))
            for shard in shards:
                assert shard.data is not None
                place = shard.global_slice()
                pieces.append((shard.key, shard.global_shape, place, shard.data.detach().clone()))
            parameter.data.copy_(kept)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pieces)
    gradients: Gradients = {}
    for key, shape, place, values in (piece for of_rank in everyone for piece in of_rank):
        gradients.setdefault(key, torch.full(shape, torch.nan))[place] = values
    return gradients
