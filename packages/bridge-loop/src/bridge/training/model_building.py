"""From a model configuration to the chunks that are trained on this rank.

build -> initial weights -> 16-bit wrapper -> adapters, if any -> megatron-core's DDP -> the hooks
of its schedules.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from bridge.training.config import ConfigContainer
from bridge.training.contracts import HoldsOneModule, ModuleRanks, own_groups
from bridge.training.distributed import Ranks
from bridge.training.trainable import GradientWatch
from bridge.training.usage_error import UsageError
from bridge.training.weights_init import initialize_weights

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


def build_model(
    config: ConfigContainer,
    ranks: Ranks,
    adapt: Callable[[list[Any]], None] | None = None,
    *,
    loaded_next: bool = False,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks, DDP-wrapped: one, or one a virtual pipeline stage.

    Of a model whose modules are on ranks of their own, the module on this rank is wrapped, and the
    model around it is as it was built.

    Args:
        config: A resolved configuration.
        ranks: The process groups.
        adapt: Changes the chunks before DDP takes hold of what trains in them.
        loaded_next: As for `build_chunks`.
    """
    chunks = build_chunks(config, ranks, loaded_next=loaded_next)
    if adapt is not None:
        adapt(chunks)
    if isinstance(ranks.pg_collection, ModuleRanks):
        return [_with_wrapped_module(config, ranks, chunk) for chunk in chunks]
    return _wrap_in_ddp(config, ranks, chunks, chunks[0].config)


def build_chunks(config: ConfigContainer, ranks: Ranks, *, loaded_next: bool = False) -> list[Any]:
    """Build this rank's model chunks with initial weights, wrapped for 16 bits where that is due.

    Args:
        config: A resolved configuration.
        ranks: The process groups.
        loaded_next: Whether a checkpoint of the whole model is loaded next. Its weights need no
            initial values then, which take five seconds for each billion.
    """
    from megatron.core.transformer.module import Float16Module

    chunks: list[Any] = [_on_device(chunk, ranks.device) for chunk in _bare_chunks(config, ranks)]
    # Here and never again: later on, what a callback has put to sleep stays asleep.
    for chunk in chunks:
        chunk.train()
    if config.rng.layout_invariant_init:
        initialize_weights(chunks, config.rng.seed, ranks.own_groups, only_padded=loaded_next)
    model_config = chunks[0].config
    if isinstance(ranks.pg_collection, ModuleRanks):
        # The module on this rank is made 16 bits for itself.
        return chunks
    if model_config.bf16 or model_config.fp16:
        chunks = [Float16Module(model_config, chunk) for chunk in chunks]
    return chunks


def ddp_parts(model: list[Any]) -> list[Any]:
    """Return what megatron-core's DDP wraps on this rank: the chunks, or a module in a chunk."""
    from megatron.core.distributed import DistributedDataParallel

    return [
        part
        for chunk in model
        # Nothing within DDP is wrapped again, and a step asks too often to go through all of it.
        for part in ([chunk] if isinstance(chunk, DistributedDataParallel) else chunk.modules())
        if isinstance(part, DistributedDataParallel)
    ]


def without_ddp(chunk: Any) -> Any:
    """Return a chunk without the DDP around it, if there is one."""
    from megatron.core.distributed import DistributedDataParallel

    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def attach_hooks(config: ConfigContainer, model: list[Any], optimizer: Any, timers: Any) -> None:
    """Give megatron-core's schedules the loop's hooks: no_sync, grad scale, grad finalisation.

    They live on the model's TransformerConfig, where the schedules look for them. The chunks of a
    rank share one such object; a model that made copies would train without its gradients reduced,
    so that is refused.

    Raises:
        UsageError: The chunks do not share their config, or it has the loss divided in another
            way than the run.
    """
    from megatron.core.transformer.module import Float16Module
    from megatron.core.utils import get_model_config

    model_config = get_model_config(model[0])
    for chunk in model:
        inner = without_ddp(chunk)
        if isinstance(inner, Float16Module):
            inner = inner.module
        if get_model_config(chunk) is not model_config or inner.config is not model_config:
            raise UsageError(
                f"model: {type(inner).__name__}.config is not the config of its first chunk; build "
                "every chunk with the same config object, since the loop's hooks live on it"
            )
    mode, per_token = config.train.loss_normalization, model_config.calculate_per_token_loss
    if per_token != (mode == "token"):
        raise UsageError(
            f"model: {type(inner).__name__}.config has calculate_per_token_loss={per_token}, which "
            f"contradicts train.loss_normalization={mode}; build the model without changing it"
        )
    model_config.timers = timers
    model_config.grad_scale_func = optimizer.scale_loss
    # Only where a part is frozen: a model of one's own may use a weight at some steps alone.
    watch = GradientWatch(model) if config.peft is not None else None
    model_config.finalize_model_grads_func = GradientFinalizer(watch)
    if config.ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        model_config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    if config.ddp.overlap_param_gather and config.ddp.align_param_gather:
        param_sync = [chunk.start_param_sync for chunk in model]
        model_config.param_sync_func = param_sync if len(model) > 1 else param_sync[0]


def detach_hooks(model: list[Any]) -> None:
    """Take the loop's hooks and DDP's off again, so that a finished run's memory can be freed.

    The optimizer's shards are views of parameters, whose autograd nodes hold DDP's hooks, which
    hold DDP and its config. Were the optimizer still on the config, it would hold itself through
    C++, where Python's collector does not see it, and with it the model and the process groups.
    """
    from megatron.core.utils import get_model_config

    for part in ddp_parts(model):
        part.grad_accs.clear()
        if part.remove_forward_pre_hook_handles:
            part.disable_forward_pre_hook(param_sync=False)
    model_config = get_model_config(model[0])
    model_config.timers = None
    model_config.grad_scale_func = None
    model_config.finalize_model_grads_func = None
    model_config.no_sync_func = None
    model_config.param_sync_func = None


class GradientFinalizer:
    """megatron-core's finalize_model_grads, and how often it was called.

    A schedule that does not call it leaves gradients unreduced and undivided, and trains on.

    Args:
        watch: Has seen which parameters got a gradient; None where nobody looks.
    """

    def __init__(self, watch: GradientWatch | None = None) -> None:
        self.calls = 0
        self._watch = watch

    def __call__(
        self,
        model: list[Any],
        num_tokens: torch.Tensor | None = None,
        *,
        pg_collection: "ProcessGroupCollection | ModuleRanks",
        **options: Any,
    ) -> None:
        """Reduce the gradients over all ranks and divide them by the number of tokens.

        Without a token they become 0. megatron-core would divide by 1 then, which leaves the
        gradients of auxiliary losses as sums over all positions.

        Args:
            model: This rank's model chunks, DDP-wrapped.
            num_tokens: Tokens of this rank's microbatches on the last pipeline stage; it holds
                those of all ranks afterwards. None if nothing is divided.
            pg_collection: The process groups.
            options: megatron-core's own.

        Raises:
            RuntimeError: In the first step a parameter that is watched got no gradient.
        """
        from megatron.core.distributed import finalize_model_grads

        self.calls += 1
        if self._watch is not None:
            self._watch.check()
            self._watch = None
        parts, groups = ddp_parts(model), own_groups(pg_collection)
        if parts:
            finalize_model_grads(parts, None, pg_collection=groups, **options)
        factor: Any = 1.0
        if isinstance(pg_collection, ModuleRanks):
            factor = pg_collection.gradient_factor(summed=num_tokens is not None)
        if num_tokens is not None:
            if isinstance(pg_collection, ModuleRanks):
                pg_collection.total(num_tokens)
            else:
                last_stage = dist.get_process_group_ranks(groups.pp)[-1]
                dist.broadcast(num_tokens, src=last_stage, group=groups.pp)
                dist.all_reduce(num_tokens, group=groups.dp_cp)
            factor = factor * (num_tokens > 0) / num_tokens.clamp(min=1)
        elif factor == 1.0:
            return
        for part in parts:
            part.scale_gradients(factor)


@contextlib.contextmanager
def parameters_in_sync(model: list[Any]) -> Iterator[None]:
    """Make every rank's parameters whole, for evaluation and checkpoints.

    With overlapped gathering a rank has only its own shard of the new parameters until the next
    training step's forward pass fetches the others, layer by layer.
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
    """Make ``main_grad`` the whole reduced gradient on every rank; a collective.

    The distributed optimizer's reduction leaves each data-parallel rank the shard that it updates.
    The rest of the buffer holds what this rank alone has computed.
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


def count_parameters(model: list[torch.nn.Module]) -> int:
    """Return the number of parameters on this rank."""
    return sum(parameter.numel() for chunk in model for parameter in chunk.parameters())


def _bare_chunks(config: ConfigContainer, ranks: Ranks) -> list[torch.nn.Module]:
    virtual_stages = ranks.layout.virtual_pipeline
    stages = range(virtual_stages) if virtual_stages else (None,)
    chunks = []
    for vp_stage in stages:
        chunk = config.model.build(
            pg_collection=cast("ProcessGroupCollection", ranks.pg_collection),
            pre_process=ranks.stage == 0 and vp_stage in (None, 0),
            post_process=ranks.is_last_stage
            and (virtual_stages is None or vp_stage == virtual_stages - 1),
            vp_stage=vp_stage,
        )
        if not isinstance(chunk, torch.nn.Module):
            raise UsageError(
                f"model.build: returned {type(chunk).__name__}; it must return a torch.nn.Module"
            )
        chunks.append(_as_megatron_module(chunk, config, ranks))
    return chunks


def _as_megatron_module(module: Any, config: ConfigContainer, ranks: Ranks) -> torch.nn.Module:
    from megatron.core.enums import ModelType
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )

    for parameter in module.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if not isinstance(getattr(module, "config", None), ModelParallelConfig):
        module = _plain_module(module, _config_for_plain_module(config), ranks)
    if not hasattr(module, "model_type"):
        module.model_type = ModelType.encoder_or_decoder
    return cast(torch.nn.Module, module)


def _plain_module(
    module: torch.nn.Module, model_config: "TransformerConfig", ranks: Ranks
) -> torch.nn.Module:
    """Give a module of one's own what megatron-core's schedules ask of a model."""
    from megatron.core.transformer.module import MegatronModule

    class PlainModule(MegatronModule):
        """A module that knows nothing of megatron-core, trained data-parallel."""

        def __init__(self) -> None:
            super().__init__(model_config)
            self.module = module
            self.pg_collection = ranks.own_groups
            self.tp_group = ranks.own_groups.tp

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

        def set_input_tensor(self, input_tensor: Any) -> None:
            """Take nothing: without a pipeline there is no earlier stage."""

    return PlainModule()


def _config_for_plain_module(config: ConfigContainer) -> "TransformerConfig":
    from megatron.core.transformer.transformer_config import TransformerConfig

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = half.get(config.mixed_precision.precision, torch.float32)
    return TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        calculate_per_token_loss=config.train.loss_normalization == "token",
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
    )


def _on_device(module: torch.nn.Module, device: str) -> torch.nn.Module:
    return module.cuda(torch.cuda.current_device()) if device == "cuda" else module


def _with_wrapped_module(config: ConfigContainer, ranks: Ranks, model: Any) -> torch.nn.Module:
    """Wrap the module of `model` that is on this rank."""
    if not isinstance(model, HoldsOneModule):
        raise UsageError(
            f"model.build: {type(model).__name__} has no own_module and replace_own_module, which "
            "a model whose modules are on ranks of their own needs"
        )
    module, module_config = model.own_module()
    if module_config.bf16:
        # Not megatron-core's wrapper: its outputs would be float32, and travel to other ranks.
        module = module.bfloat16()
    [wrapped] = _wrap_in_ddp(config, ranks, [module], module_config)
    model.replace_own_module(wrapped)
    return cast(torch.nn.Module, model)


def _wrap_in_ddp(
    config: ConfigContainer, ranks: Ranks, chunks: list[Any], model_config: Any
) -> list[torch.nn.Module]:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # DDP writes the bucket size into its config.
    groups, ddp_config = ranks.own_groups, dataclasses.replace(config.ddp)
    bucket_size = ddp_config.bucket_size or max(40_000_000, 1_000_000 * groups.dp_cp.size())
    if ddp_config.num_buckets is not None:
        trained = sum(p.numel() for p in chunks[0].parameters() if p.requires_grad)
        bucket_size = max(1, math.ceil(trained / ddp_config.num_buckets))
        ddp_config = dataclasses.replace(ddp_config, num_buckets=None, bucket_size=bucket_size)
    wrap = partial(DistributedDataParallel, config=model_config, pg_collection=groups)
    wrapped: list[torch.nn.Module] = []
    for index, chunk in enumerate(chunks):
        layout = None
        if ddp_config.use_distributed_optimizer:
            layout = DistributedOptimizer.compute_full_param_layout(
                [parameter for parameter in chunk.parameters() if parameter.requires_grad],
                bucket_size if ddp_config.overlap_grad_reduce else None,
                groups.intra_dp_cp.size(),
                ddp_config,
                expert_data_parallel_world_size=groups.intra_expt_dp.size(),
            )
        wrapped.append(
            wrap(
                ddp_config=ddp_config,
                module=chunk,
                # Only the first chunk's gradients are ready early enough for buckets to help.
                disable_bucketing=index > 0,
                full_param_layout=layout,
            )
        )
    return wrapped
