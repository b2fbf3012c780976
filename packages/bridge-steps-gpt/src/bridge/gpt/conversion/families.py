"""The families of models that convert, and which of ours belong to one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.nn import functional

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.gpt.model_config import GPTModelConfig


@dataclass(kw_only=True, frozen=True)
class Family:
    """One architecture of Hugging Face's."""

    architecture: str
    """The class of the model there, as config.json names it."""
    model_type: str
    """The short name beside it."""
    qk_layernorm: bool
    """Whether queries and keys are normalised."""
    may_have_biases: bool
    """Whether all linear layers can have biases."""
    default_head_dim: int | None
    """What an absent head_dim means; None for hidden_size / num_attention_heads."""


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    qk_layernorm=False,
    may_have_biases=True,
    default_head_dim=None,
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    qk_layernorm=True,
    may_have_biases=False,
    default_head_dim=128,
)
FAMILIES = {family.architecture: family for family in (LLAMA, QWEN3)}
SUPPORTED = "LlamaForCausalLM (Llama 2 to 3) and Qwen3ForCausalLM (Qwen3's dense models)"

COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": functional.silu,
    "position_embedding_type": "rope",
}
"""Fields of our model section that the families have in common, and other models have not."""

# And those that change what a model computes and that no model of the families has set.
_PLAIN: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "add_qkv_bias": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "glu_linear_offset": 0.0,
    "layernorm_zero_centered_gamma": False,
    "linear_attention_freq": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_moe_experts": None,
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "use_mup": False,
    "window_size": None,
}


def family_of(model: "GPTModelConfig") -> Family:
    """Return the family that a model belongs to: Qwen3 normalises queries and keys, Llama does not.

    Raises:
        UsageError: It belongs to none; the message has a line for each field that says so.
    """
    family = QWEN3 if model.qk_layernorm else LLAMA
    if problems := list(_differences(model, family)):
        raise UsageError(
            f"the model has no counterpart among {SUPPORTED}:\n  " + "\n  ".join(problems)
        )
    return family


def _differences(model: "GPTModelConfig", family: Family) -> Iterator[str]:
    for name, wanted in (COMMON | _PLAIN).items():
        found = getattr(model, name)
        if found != wanted:
            yield f"model.{name}: {_text(found)}; these families have {_text(wanted)}"
    if model.add_bias_linear and not family.may_have_biases:
        yield f"model.add_bias_linear: True; {family.architecture} has no biases in its MLP"


def _text(value: Any) -> str:
    return getattr(value, "__name__", repr(value))
