"""Families of Llama's block: RMSNorm, rotary embedding, SwiGLU, grouped queries."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from bridge.gpt.families.rotary import read_rope, rope_problems, rope_scaling_of
from bridge.gpt.families.weight_map import weight_map
from bridge.training.contracts import ExportedWeight
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.gpt.model_config import GPTModelConfig

LONGEST_SAMPLE = 4096
"""The largest seq_length of an imported model. It may have a hundred thousand positions, and a
sample of that size rarely fits."""

_COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": functional.silu,
    "position_embedding_type": "rope",
}
"""Fields of our model section that all these families set."""

# Fields that change what a model computes, with the value that leaves it as it is.
_UNCHANGED: dict[str, Any] = {
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


@dataclass(kw_only=True, frozen=True)
class LlamaLike:
    """A family: one architecture of Hugging Face's, and its counterpart in our model section."""

    architecture: str
    """The class of the model in Hugging Face's format, as config.json names it."""
    model_type: str
    """The short name of the architecture in config.json."""
    models: str
    """The published models that belong to it, for messages."""
    own_fields: Mapping[str, Any]
    """Fields of our model section by which it differs from the other families."""
    may_have_biases: bool
    """Whether all linear layers can have biases."""
    default_head_dim: int | None
    """The value of an absent head_dim; None for hidden_size / num_attention_heads."""

    def resembles(self, model: "GPTModelConfig") -> bool:
        """Whether a model has the fields by which the family differs from the others."""
        return all(getattr(model, name) == value for name, value in self.own_fields.items())

    def problems_of_model(self, model: "GPTModelConfig") -> Iterator[str]:
        """Yield a line for each field whose value no model of the family has."""
        for name, wanted in (_COMMON | _UNCHANGED | dict(self.own_fields)).items():
            found = getattr(model, name)
            if found != wanted:
                yield f"model.{name}: {_name_of(found)}; these families have {_name_of(wanted)}"
        if model.add_bias_linear and not self.may_have_biases:
            yield f"model.add_bias_linear: True; {self.architecture} has no biases in its MLP"

    def problems_of_config(self, values: Mapping[str, Any]) -> Iterator[str]:
        """Yield a line for each thing in a config.json that is not supported."""
        if (activation := values.get("hidden_act", "silu")) != "silu":
            yield f"hidden_act: {activation!r}; only 'silu' is"
        if quantization := values.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            yield f"quantization_config: {method or quantization}; convert the unquantized model"
        if values.get("use_sliding_window"):
            yield "use_sliding_window: true; only attention to all earlier positions is"
        kinds = set(values.get("layer_types") or []) - {"full_attention"}
        if kinds:
            yield f"layer_types: {', '.join(sorted(kinds))}; only full_attention is"
        if values.get("num_experts") or values.get("num_local_experts"):
            yield "num_experts: only dense models are"
        attention, mlp = bool(values.get("attention_bias")), bool(values.get("mlp_bias"))
        if attention != mlp:
            yield (
                f"attention_bias: {attention} with mlp_bias {mlp}; megatron-core has biases in all "
                "linear layers or in none"
            )
        elif attention and not self.may_have_biases:
            yield "attention_bias: true; only models without biases are"
        yield from rope_problems(read_rope(values))

    def section_fields(self, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return the fields of our model section for a config.json.

        Args:
            values: The content of config.json, in which `problems_of_config` finds none.
            path: The file, for messages.

        Raises:
            UsageError: A size is missing or is no whole number above 0.
        """

        def size(name: str, default: int | None = None) -> int:
            value = default if values.get(name) is None else values[name]
            if type(value) is not int or value < 1:
                raise UsageError(f"{path}: {name} is {value!r}; it must be a whole number above 0")
            return value

        heads, hidden, vocabulary = (
            size(name) for name in ("num_attention_heads", "hidden_size", "vocab_size")
        )
        rope = read_rope(values)
        return {
            **_COMMON,
            **self.own_fields,
            "num_layers": size("num_hidden_layers"),
            "hidden_size": hidden,
            "ffn_hidden_size": size("intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": size("num_key_value_heads", heads),
            "kv_channels": size("head_dim", self.default_head_dim or hidden // heads),
            "vocab_size": vocabulary,
            "make_vocab_size_divisible_by": math.gcd(vocabulary, 128),
            "seq_length": min(size("max_position_embeddings"), LONGEST_SAMPLE),
            "layernorm_epsilon": float(values.get("rms_norm_eps", 1e-6)),
            "add_bias_linear": bool(values.get("attention_bias", False)),
            "share_embeddings_and_output_weights": bool(values.get("tie_word_embeddings", False)),
            "rotary_base": int(rope["rope_theta"]),
            "rope_scaling": rope["rope_type"] == "llama3",
            "rope_scaling_factor": float(rope.get("factor", 8.0)),
            "hidden_dropout": 0.0,
            "attention_dropout": float(values.get("attention_dropout") or 0.0),
            "init_method_std": float(values.get("initializer_range", 0.02)),
        }

    def config_json(self, model: "GPTModelConfig", dtype: torch.dtype) -> dict[str, Any]:
        """Return the config.json of a model of the family, with weights of a type."""
        values: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.mlp_width,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.query_groups,
            "head_dim": model.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": model.seq_length,
            "rms_norm_eps": model.layernorm_epsilon,
            "rope_theta": float(model.rotary_base),
            "rope_scaling": rope_scaling_of(model),
            "attention_bias": model.add_bias_linear,
            "attention_dropout": model.attention_dropout,
            "tie_word_embeddings": model.share_embeddings_and_output_weights,
            "initializer_range": model.init_method_std,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        if self.may_have_biases:
            values["mlp_bias"] = model.add_bias_linear
        return values

    def exported_weights(self, model: "GPTModelConfig") -> dict[str, ExportedWeight]:
        """Return every weight of a model of the family, with its tensors in Hugging Face's format.

        Raises:
            UsageError: The model's vocab_size is open.
        """
        return weight_map(model)


def _name_of(value: Any) -> str:
    return getattr(value, "__name__", repr(value))
