"""The modules of a transformer: Transformer Engine's, or local ones without it.

The local layers are for the CPU emulation and for GPUs without Transformer Engine. megatron-core's
own local layers reject sequence parallelism (their norm) and context parallelism (their attention).
Those of `bridge.training.transformer.local_layers` support both.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, override

from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.training.transformer.local_layers import LayerNorm, LocalAttention, RMSNorm
    from bridge.training.transformer.router import Router


def has_transformer_engine() -> bool:
    """Whether megatron-core found Transformer Engine when it was imported."""
    return bool(HAVE_TE)


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Whether a finalized transformer is made of Transformer Engine's modules."""
    return config.transformer_impl == "transformer_engine"


def adapt_layer(layer: Any, config: TransformerConfig) -> ModuleSpec:
    """Return a layer spec of megatron-core with our choice of modules in it."""
    mlp = layer.submodules.mlp
    if isinstance(mlp, partial) and mlp.func is MoELayer:
        experts = dataclasses.replace(mlp.keywords["submodules"], router=Router)
        submodules = dataclasses.replace(layer.submodules, mlp=partial(mlp, submodules=experts))
        layer = dataclasses.replace(layer, submodules=submodules)
    if not uses_transformer_engine(config):
        return _local_layer(layer, config)
    if config.use_transformer_engine_op_fuser and config.num_moe_experts is None:
        # megatron-core's block spec has no option for the fused MLP.
        return get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            use_te_op_fuser=True,
            use_te_activation_func=config.use_te_activation_func,
        )
    unchanged: ModuleSpec = layer
    return unchanged


def decoder_block_spec(
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
    pp_rank: int = 0,
    adapt: Callable[[Any, TransformerConfig], ModuleSpec] = adapt_layer,
) -> TransformerBlockSubmodules:
    """Return the layers of one chunk of a causal transformer and the norm after the last of them.

    Args:
        config: The finalized transformer; ``config.transformer_impl`` chooses the modules.
        vp_stage: Index of the virtual pipeline stage, None without interleaving.
        pp_rank: This rank's stage of the pipeline.
        adapt: Returns a layer spec for each of megatron-core's.
    """
    block: Any = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=uses_transformer_engine(config),
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    return TransformerBlockSubmodules(
        layer_specs=[adapt(spec, config) for spec in block.layer_specs],
        layer_norm=block.layer_norm if uses_transformer_engine(config) else _local_norm(config),
    )


def encoder_block_spec(
    config: TransformerConfig, *, pp_rank: int = 0
) -> TransformerBlockSubmodules:
    """Return the layers of a transformer in which every position attends to all others.

    Args:
        config: As for `decoder_block_spec`.
        pp_rank: This rank's stage of the pipeline.
    """
    return decoder_block_spec(config, pp_rank=pp_rank, adapt=_layer_without_mask)


def backend_of(config: TransformerConfig) -> BackendSpecProvider:
    """Return the provider of the single modules of a finalized transformer."""
    if uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return _LocalBackend(config)


class _LocalBackend(LocalSpecProvider):
    """megatron-core's local modules with our norm and our attention."""

    def __init__(self, config: TransformerConfig) -> None:
        self._config = config

    @override
    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        return _local_norm(self._config)

    @override
    def core_attention(self) -> type:
        return LocalAttention


def _local_norm(config: TransformerConfig) -> Any:
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm


def _layer_without_mask(layer: Any, config: TransformerConfig) -> ModuleSpec:
    layer = adapt_layer(layer, config)
    attention = layer.submodules.self_attention
    params = {**(attention.params or {}), "attn_mask_type": AttnMaskType.no_mask}
    attention = dataclasses.replace(attention, params=params)
    replaced: ModuleSpec = dataclasses.replace(
        layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention)
    )
    return replaced


def _local_layer(layer: Any, config: TransformerConfig) -> ModuleSpec:
    """Return `layer` with every norm and the core attention replaced by ours."""
    norm = _local_norm(config)
    attention = layer.submodules.self_attention
    # The norms of queries and keys may also be absent, or an L2 norm without weights.
    has_qk_norm = config.qk_layernorm and not config.qk_l2_norm
    qk_norms = {"q_layernorm": norm, "k_layernorm": norm} if has_qk_norm else {}
    submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=norm,
        pre_mlp_layernorm=norm,
        self_attention=dataclasses.replace(
            attention,
            submodules=dataclasses.replace(
                attention.submodules, core_attention=LocalAttention, **qk_norms
            ),
        ),
    )
    local: ModuleSpec = dataclasses.replace(layer, submodules=submodules)
    return local
