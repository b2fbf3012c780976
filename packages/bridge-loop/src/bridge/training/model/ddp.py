"""megatron-core's DDP around the model: wrap it, and gather shards."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from bridge.training.config import ConfigContainer

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def ddp_parts(model: list[Any]) -> list[Any]:
    """Return the DDP wrappers on this rank: the chunks, or a module in a chunk."""
    from megatron.core.distributed import DistributedDataParallel

    return [
        part
        for chunk in model
        # Nothing within DDP is wrapped again, and a search in it at each step would take long.
        for part in ([chunk] if isinstance(chunk, DistributedDataParallel) else chunk.modules())
        if isinstance(part, DistributedDataParallel)
    ]


def without_ddp(chunk: Any) -> Any:
    """Return a chunk without the DDP around it, if there is one."""
    from megatron.core.distributed import DistributedDataParallel

    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


@contextlib.contextmanager
def parameters_in_sync(model: list[Any]) -> Iterator[None]:
    """Gather the unsharded parameters on every rank, for evaluation and checkpoints.

    With ddp.overlap_param_gather a rank has only its own shard of the new parameters until the next
    training step's forward pass gathers the others, layer by layer.
    """
    gathering = [part for part in ddp_parts(model) if part.remove_forward_pre_hook_handles]
    for part in gathering:
        part.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for part in gathering:
            part.enable_forward_pre_hook()


def gather_gradients(model: list[Any]) -> None:
    """Gather the unsharded reduced gradient in ``main_grad`` on every rank; a collective.

    The distributed optimizer's reduction gives each data-parallel rank the shard that it updates.
    The rest of the buffer has this rank's own gradients, unreduced.
    """
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for part in ddp_parts(model):
        if not part.ddp_config.use_distributed_optimizer:
            continue
        for buckets in (*part.bucket_groups, *part.expert_parallel_bucket_groups):
            group = buckets.intra_distributed_optimizer_instance_group
            for bucket in buckets.buckets:
                shard = shard_buffer(bucket.grad_data, group.size())[group.rank()]
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def wrap_in_ddp(
    config: ConfigContainer,
    groups: "ProcessGroupCollection",
    modules: list[Any],
    model_config: Any,
) -> list[torch.nn.Module]:
    """Wrap modules in megatron-core's DDP.

    Args:
        config: The run.
        groups: Their process groups.
        modules: This rank's model chunks, or a module of one.
        model_config: megatron-core's config, which they share.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # DDP writes the bucket size into its config.
    ddp_config = dataclasses.replace(config.ddp)
    bucket_size = ddp_config.bucket_size or max(40_000_000, 1_000_000 * groups.dp_cp.size())
    if ddp_config.num_buckets is not None:
        trained = sum(p.numel() for p in modules[0].parameters() if p.requires_grad)
        bucket_size = max(1, math.ceil(trained / ddp_config.num_buckets))
        ddp_config = dataclasses.replace(ddp_config, num_buckets=None, bucket_size=bucket_size)
    wrap = partial(DistributedDataParallel, config=model_config, pg_collection=groups)
    wrapped: list[torch.nn.Module] = []
    for index, module in enumerate(modules):
        layout = None
        if ddp_config.use_distributed_optimizer:
            layout = DistributedOptimizer.compute_full_param_layout(
                [parameter for parameter in module.parameters() if parameter.requires_grad],
                bucket_size if ddp_config.overlap_grad_reduce else None,
                groups.intra_dp_cp.size(),
                ddp_config,
                expert_data_parallel_world_size=groups.intra_expt_dp.size(),
            )
        wrapped.append(
            wrap(
                ddp_config=ddp_config,
                module=module,
                # Only the first chunk's gradients are ready early enough for buckets to help.
                disable_bucketing=index > 0,
                full_param_layout=layout,
            )
        )
    return wrapped
