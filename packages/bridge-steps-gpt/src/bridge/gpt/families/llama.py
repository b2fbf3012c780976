"""Llama 2 to 3: the block that other families start from."""

from bridge.gpt.families.llama_like import LlamaLike

LLAMA = LlamaLike(
    architecture="LlamaForCausalLM",
    model_type="llama",
    models="Llama 2 to 3",
    own_fields={"qk_layernorm": False},
    may_have_biases=True,
    default_head_dim=None,
)
