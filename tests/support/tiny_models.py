"""GPT models small enough for a test: megatron-core's local layers, our norm and attention."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.model.local_layers import LayerNorm, LocalAttention, RMSNorm

VOCABULARY = 64
SEQUENCE = 16


def tiny_config(**changes: Any) -> TransformerConfig:
    """Return a finalised config: 4 gated layers of width 32, 4 heads in 2 query groups."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**(values | changes))


def layout_of(**layout: int) -> dict[str, Any]:
    """Initialise megatron-core's groups and return the config's share of the layout.

    Args:
        layout: Any of tp, pp, vpp, cp, ep, etp.
    """
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": layout.get("tp", 1),
        "pipeline_model_parallel_size": layout.get("pp", 1),
        "virtual_pipeline_model_parallel_size": layout.get("vpp"),
        "context_parallel_size": layout.get("cp", 1),
        "expert_model_parallel_size": layout.get("ep", 1),
        "expert_tensor_parallel_size": layout.get("etp", layout.get("tp", 1)),
    }
    parallel_state.initialize_model_parallel(**sizes)
    # With two stages batched transfers of an interleaved schedule swap activations and gradients.
    extra = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if layout.get("vpp") else {}
    return sizes | extra


def build_tiny_gpt(config: TransformerConfig, **arguments: Any) -> list[GPTModel]:
    """Build this rank's chunks of a GPT with tied embeddings, for the groups that are up."""
    stages = range(config.virtual_pipeline_model_parallel_size or 0) or (None,)
    return [_build_chunk(config, stage, arguments) for stage in stages]


def _build_chunk(
    config: TransformerConfig, vp_stage: int | None, arguments: dict[str, Any]
) -> GPTModel:
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    layer: Any = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = LocalAttention
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": True,
    }
    ends: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    spec: Any = TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
    return GPTModel(
        config,
        spec,
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        vp_stage=vp_stage,
        **(defaults | arguments),
    )
