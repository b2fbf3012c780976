"""config.json of Hugging Face's Llama and Qwen3, and our model section."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.gpt.conversion.families import COMMON, FAMILIES, SUPPORTED, Family, family_of
from bridge.gpt.model_config import GPTModelConfig
from bridge.training.usage_error import UsageError

LONGEST_SAMPLE = 4096
"""An imported model's seq_length, where it has as many positions: they may be a hundred thousand,
and a sample of that size rarely fits."""

# The constants of Llama 3.1's rotary embedding, which megatron-core has in its code.
_ROPE_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
# A recipe may train with others, which does not change what the model is.
_OF_TRAINING = ("attention_dropout", "initializer_range")
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def read_model_config(directory: str | Path) -> GPTModelConfig:
    """Return the model section for a folder in Hugging Face's format; no weight is read.

    What the folder's config.json says goes along in ``hf_files``. The vocabulary is padded only
    where the tensor-parallel size does not divide it, so the model's losses are those of the
    original.

    Raises:
        UsageError: There is no config.json, or the architecture or something in it is not
            supported; the message names it, and what is.
    """
    folder = Path(directory)
    values = read_json(folder / CONFIG)
    model = _model_of(values, folder / CONFIG)
    model.hf_files = {CONFIG: json.dumps(values, ensure_ascii=False)}
    if (folder / GENERATION_CONFIG).exists():
        generation = read_json(folder / GENERATION_CONFIG)
        model.hf_files[GENERATION_CONFIG] = json.dumps(generation, ensure_ascii=False)
    return model


def _model_of(values: Mapping[str, Any], path: Path) -> GPTModelConfig:
    family = _family(values, path)
    if problems := list(_unsupported(values, family)):
        raise UsageError(
            f"{path}: this {family.architecture} is not supported:\n  " + "\n  ".join(problems)
        )
    number = _Numbers(values, path)
    heads, hidden = number("num_attention_heads"), number("hidden_size")
    vocabulary = number("vocab_size")
    head_dim = family.default_head_dim or hidden // heads
    rope = _rope(values)
    return GPTModelConfig(
        **COMMON,
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=number("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=number("num_key_value_heads", heads),
        kv_channels=number("head_dim", head_dim),
        vocab_size=vocabulary,
        make_vocab_size_divisible_by=math.gcd(vocabulary, 128),
        seq_length=min(number("max_position_embeddings"), LONGEST_SAMPLE),
        layernorm_epsilon=float(values.get("rms_norm_eps", 1e-6)),
        qk_layernorm=family.qk_layernorm,
        add_bias_linear=bool(values.get("attention_bias", False)),
        share_embeddings_and_output_weights=bool(values.get("tie_word_embeddings", False)),
        rotary_base=int(rope["rope_theta"]),
        rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=float(rope.get("factor", 8.0)),
        hidden_dropout=0.0,
        attention_dropout=float(values.get("attention_dropout") or 0.0),
        init_method_std=float(values.get("initializer_range", 0.02)),
    )


def config_json(
    model: GPTModelConfig, dtype: torch.dtype, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json for a model.

    Of an imported model it is the original's, with what differs from it since.

    Args:
        model: The model section.
        dtype: Type of the weights.
        known: The config.json beside the tokenizer, for a model that was not imported. If it is of
            a model of the same size, what ours has no place for, as the ids of special tokens, is
            taken from it.

    Raises:
        UsageError: The model is of no family that Hugging Face's format has a place for.
    """
    values = _values(model, dtype)
    if model.hf_files is not None:
        return _changed(json.loads(model.hf_files[CONFIG]), values, dtype)
    if any(known.get(name) != values[name] for name in _SIZES):
        return values
    return values | {name: known[name] for name in _KEPT if name in known}


def _changed(
    original: dict[str, Any], values: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Return a config.json with what the model has other than the one that was imported."""
    imported = _values(_model_of(original, Path(CONFIG)), dtype)
    changes = {
        name: value
        for name, value in values.items()
        if name not in _OF_TRAINING and value != imported.get(name)
    }
    # A sample may be shorter than the positions that the model knows.
    positions = max(original["max_position_embeddings"], values["max_position_embeddings"])
    kept = dict(original)
    if not changes.keys().isdisjoint(_ROPE):
        # Its own words for it may be those of newer files.
        kept = {name: value for name, value in kept.items() if name not in _ROPE}
        changes |= {name: values[name] for name in ("rope_theta", "rope_scaling")}
    changes["dtype" if "dtype" in original else "torch_dtype"] = values["torch_dtype"]
    return kept | changes | {"max_position_embeddings": positions}


def _values(model: GPTModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return what the model section says, in the words of config.json."""
    family = family_of(model)
    heads = model.num_attention_heads
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.num_query_groups or heads,
        "head_dim": model.kv_channels or model.hidden_size // heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": float(model.rotary_base),
        "rope_scaling": _rope_scaling(model),
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
    if family.may_have_biases:
        values["mlp_bias"] = model.add_bias_linear
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UsageError: There is no such file, or it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a model in Hugging "
            "Face's format"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: is no JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no object but {type(values).__name__}; fetch it again")
    return values


class _Numbers:
    """Reads whole numbers of a config.json."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self._values, self._path = values, path

    def __call__(self, name: str, default: int | None = None) -> int:
        value = self._values.get(name)
        if value is None:
            value = default
        if type(value) is not int or value < 1:
            raise UsageError(
                f"{self._path}: {name} is {value!r}; it must be a whole number above 0"
            )
        return value


def _family(values: Mapping[str, Any], path: Path) -> Family:
    architectures = values.get("architectures") or []
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name]
    named = ", ".join(architectures) or f"no architecture (model_type {values.get('model_type')!r})"
    raise UsageError(f"{path}: {named} is not supported; supported are {SUPPORTED}")


def _unsupported(values: Mapping[str, Any], family: Family) -> Iterator[str]:
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
    elif attention and not family.may_have_biases:
        yield "attention_bias: true; only models without biases are"
    yield from _unsupported_rope(_rope(values))


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of the rotary embedding, in the words of newer files.

    Older ones have rope_theta on its own and rope_scaling, whose kind is called type at first.
    """
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return {
        "rope_theta": values.get("rope_theta", 10000.0),
        "rope_type": given.get("type", "default"),
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
        **given,
    }


def _unsupported_rope(rope: Mapping[str, Any]) -> Iterator[str]:
    kind = rope["rope_type"]
    if kind not in ("default", "llama3"):
        yield f"rope_type: {kind!r}; only 'default' and 'llama3' are"
    if kind == "llama3":
        for name, wanted in _ROPE_CONSTANTS.items():
            if rope.get(name) != wanted:
                yield f"{name} of the rope: {rope.get(name)!r}; only Llama 3.1's {wanted} is"
    if rope["rope_theta"] != int(rope["rope_theta"]):
        yield f"rope_theta: {rope['rope_theta']!r}; only whole numbers are"
    if rope["partial_rotary_factor"] not in (None, 1.0):
        yield f"partial_rotary_factor: {rope['partial_rotary_factor']!r}; only 1 is"


def _rope_scaling(model: GPTModelConfig) -> dict[str, Any] | None:
    if not model.rope_scaling:
        return None
    return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_ROPE_CONSTANTS}
