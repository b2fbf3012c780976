"""The loop's hooks on a model's config, where megatron-core's schedules look for them."""

from typing import TYPE_CHECKING, Any

import torch

from bridge.training.config import ConfigContainer
from bridge.training.contracts import ModelRanks
from bridge.training.model.ddp import ddp_parts, without_ddp
from bridge.training.model.frozen import GradientWatch
from bridge.training.ranks.model_ranks import to_model_ranks
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def attach_hooks(config: ConfigContainer, model: list[Any], optimizer: Any, timers: Any) -> None:
    """Set the loop's hooks for megatron-core's schedules: no_sync, grad scale, finalization.

    They are attributes of the model's TransformerConfig, where the schedules look for them. The
    chunks of a rank must share one such object: with copies of it, gradients would not be reduced.

    Raises:
        UsageError: The chunks do not share their config, or its calculate_per_token_loss
            contradicts train.loss_normalization.
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
    # Only where weights are frozen: a user's model may use some weights only at some steps.
    watch = GradientWatch(model) if config.peft is not None else None
    model_config.finalize_model_grads_func = GradientFinalizer(watch)
    if config.ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        model_config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    if config.ddp.overlap_param_gather and config.ddp.align_param_gather:
        param_sync = [chunk.start_param_sync for chunk in model]
        model_config.param_sync_func = param_sync if len(model) > 1 else param_sync[0]


def detach_hooks(model: list[Any]) -> None:
    """Remove the loop's hooks and DDP's, so that the memory of a finished run can be freed.

    The optimizer's shards are views of parameters, whose autograd nodes refer to DDP's hooks, which
    refer to DDP and its config. With the optimizer on the config there would be a cycle through
    C++, which Python's garbage collector does not see, with the model and the process groups in it.
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
    """megatron-core's finalize_model_grads, and the number of its calls.

    A schedule that does not call it leaves gradients unreduced and undivided without an error.

    Args:
        watch: Checks in the first step that all trained parameters got a gradient; None to skip it.
    """

    def __init__(self, watch: GradientWatch | None = None) -> None:
        self.calls = 0
        self._watch = watch

    def __call__(
        self,
        model: list[Any],
        num_tokens: torch.Tensor | None = None,
        *,
        pg_collection: "ProcessGroupCollection | ModelRanks",
        **options: Any,
    ) -> None:
        """Reduce the gradients over all ranks and divide them by the number of tokens.

        Without a token they become 0. megatron-core would divide by 1 then, and the gradients of
        auxiliary losses would be sums over all positions.

        Args:
            model: This rank's model chunks, DDP-wrapped.
            num_tokens: Tokens of this rank's microbatches on the last pipeline stage; afterwards
                those of all ranks. None if nothing is divided.
            pg_collection: The process groups.
            options: megatron-core's own.

        Raises:
            RuntimeError: In the first step a watched parameter got no gradient.
        """
        from megatron.core.distributed import finalize_model_grads

        self.calls += 1
        if self._watch is not None:
            self._watch.check()
            self._watch = None
        parts, ranks = ddp_parts(model), to_model_ranks(pg_collection)
        if parts:
            finalize_model_grads(parts, None, pg_collection=ranks.groups, **options)
        factor: Any = ranks.gradient_factor(summed=num_tokens is not None)
        if num_tokens is not None:
            ranks.sum_tokens(num_tokens)
            factor = factor * (num_tokens > 0) / num_tokens.clamp(min=1)
        elif factor == 1.0:
            return
        for part in parts:
            part.scale_gradients(factor)
