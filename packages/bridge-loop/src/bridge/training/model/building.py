"""The model chunks of this rank, from the model configuration.

build -> initial weights -> 16-bit wrapper -> adapters, if any -> megatron-core's DDP -> the hooks
of its schedules.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast, override

import torch

from bridge.training.config import ConfigContainer
from bridge.training.model.ddp import wrap_in_ddp
from bridge.training.model.initial_weights import initialize_weights
from bridge.training.ranks.groups import Ranks
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def build_model(
    config: ConfigContainer,
    ranks: Ranks,
    adapt: Callable[[list[Any]], None] | None = None,
    *,
    loaded_next: bool = False,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks, DDP-wrapped: one, or one a virtual pipeline stage.

    Args:
        config: A resolved configuration.
        ranks: The ranks of the run.
        adapt: Changes the chunks before DDP wraps the parameters that train.
        loaded_next: As for `build_chunks`.
    """
    chunks = build_chunks(config, ranks, loaded_next=loaded_next)
    if adapt is not None:
        adapt(chunks)
    return ranks.model.wrap_model(chunks, partial(wrap_in_ddp, config, ranks.model.groups))


def build_chunks(config: ConfigContainer, ranks: Ranks, *, loaded_next: bool = False) -> list[Any]:
    """Build this rank's model chunks with initial weights, wrapped for 16 bits if configured.

    Args:
        config: A resolved configuration.
        ranks: The ranks of the run.
        loaded_next: Whether a checkpoint of all weights is loaded next. Then they need no initial
            values, which take five seconds for each billion.
    """
    chunks: list[Any] = [_on_device(chunk, ranks.device) for chunk in _bare_chunks(config, ranks)]
    # Here and never again, so that modules that a callback puts in eval mode stay there.
    for chunk in chunks:
        chunk.train()
    if config.rng.layout_invariant_init:
        initialize_weights(chunks, config.rng.seed, ranks.model.groups, only_padded=loaded_next)
    return ranks.model.to_16_bits(chunks)


def count_parameters(model: list[torch.nn.Module]) -> int:
    """Return the number of parameters on this rank."""
    return sum(parameter.numel() for chunk in model for parameter in chunk.parameters())


def _bare_chunks(config: ConfigContainer, ranks: Ranks) -> list[torch.nn.Module]:
    virtual_stages = ranks.layout.virtual_pipeline
    stages = range(virtual_stages) if virtual_stages else (None,)
    chunks = []
    for vp_stage in stages:
        chunk = config.model.build(
            pg_collection=ranks.pg_collection,
            pre_process=ranks.model.stage == 0 and vp_stage in (None, 0),
            post_process=ranks.model.is_last_stage
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
    """Wrap a user's module in the interface that megatron-core's schedules need."""
    from megatron.core.transformer.module import MegatronModule

    class PlainModule(MegatronModule):
        """A module without megatron-core's interface, trained data-parallel."""

        def __init__(self) -> None:
            super().__init__(model_config)
            self.module = module
            self.pg_collection = ranks.model.groups
            self.tp_group = ranks.model.groups.tp

        @override
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

        def set_input_tensor(self, input_tensor: Any) -> None:
            """Ignore it: without a pipeline there is no earlier stage."""

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
