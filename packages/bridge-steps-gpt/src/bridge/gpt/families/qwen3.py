"""Qwen3's dense models: Llama's block with normalized queries and keys."""

from bridge.gpt.families.llama_like import LlamaLike

QWEN3 = LlamaLike(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    models="Qwen3's dense models",
    own_fields={"qk_layernorm": True},
    may_have_biases=False,
    default_head_dim=128,
)
