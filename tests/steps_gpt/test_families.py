"""Model families: their config.json, their fields of the model section, their weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.gpt import families
from bridge.gpt.conversion.hf_config import config_json, read_model_config
from bridge.gpt.families.llama_like import LlamaLike
from bridge.training.contracts import NamesWeights
from gpt_models import tiny_gpt
from hf_models import LLAMA3_ROPE, read_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "MistralForCausalLM"}, "MistralForCausalLM is not supported; supported"),
        ({"architecture": "Qwen2ForCausalLM"}, "Qwen2ForCausalLM is not .*Qwen3ForCausalLM"),
        ({"architecture": "Qwen3MoeForCausalLM"}, "Qwen3MoeForCausalLM is not supported"),
        ({"architectures": None}, r"no architecture \(model_type 'llama'\) is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: fp8; convert the"),
        ({"use_sliding_window": True}, "use_sliding_window: true"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: sliding_attention",
        ),
        ({"attention_bias": True}, "attention_bias: True with mlp_bias False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type: 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type: 'yarn'"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 2.0}},
            r"low_freq_factor of the rope: 2\.0; only Llama 3\.1's 1\.0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a whole number"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    ],
)
def test_an_unsupported_config_is_rejected_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(error.value)


def test_all_unsupported_settings_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)hidden_act.*mlp_bias.*rope_type"):
        read_config(tmp_path, hidden_act="relu", mlp_bias=True, rope_scaling={"rope_type": "x"})


def test_a_missing_or_broken_config_is_an_error_with_its_path(tmp_path: Path) -> None:
    for text, message in ((None, "cannot be read"), ("{", "is no JSON"), ("[]", "no object")):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            read_model_config(tmp_path)


def test_older_and_newer_rope_keys_make_the_same_model(tmp_path: Path) -> None:
    older = read_config(tmp_path, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE)
    newer = read_config(tmp_path, rope_parameters={"rope_theta": 500000.0, **LLAMA3_ROPE})
    assert replace(older, hf_files=None) == replace(newer, hf_files=None)
    assert (older.rotary_base, older.rope_scaling, older.rope_scaling_factor) == (500000, True, 8.0)


def test_an_imported_vocabulary_is_padded_only_for_the_ranks(tmp_path: Path) -> None:
    model = read_config(tmp_path, vocab_size=65, max_position_embeddings=131072)
    assert (model.padded_vocab_size, model.seq_length) == (65, 4096)
    model.tensor_model_parallel_size = 2
    assert model.padded_vocab_size == 66
    assert read_config(tmp_path, vocab_size=128256).make_vocab_size_divisible_by == 128


def test_an_absent_head_dim_is_the_default_of_the_family(tmp_path: Path) -> None:
    assert read_config(tmp_path, head_dim=None).kv_channels == 8
    assert read_config(tmp_path, architecture="Qwen3ForCausalLM", head_dim=None).kv_channels == 128


def test_a_model_of_no_family_is_rejected_by_its_fields() -> None:
    model = tiny_gpt(normalization="LayerNorm", num_moe_experts=2, qk_layernorm=True)
    assert isinstance(model, NamesWeights)
    with pytest.raises(ValueError, match=r"(?s)normalization: 'LayerNorm'.*num_moe_experts: 2"):
        model.exported_weights()
    with pytest.raises(ValueError, match="add_bias_linear: True; Qwen3ForCausalLM"):
        tiny_gpt(qk_layernorm=True, add_bias_linear=True).exported_weights()


def test_fused_weights_are_split_by_query_group() -> None:
    model = tiny_gpt(num_layers=1)  # 4 heads of 8 in 2 groups
    weights = model.exported_weights()
    qkv = weights["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert qkv.shape == (64, 32)
    parts = qkv.split(torch.arange(64))  # a vector has the rows, as an adapter's side has
    q, k, v = (parts[f"model.layers.0.self_attn.{letter}_proj.weight"] for letter in "qkv")
    # In each group two heads of queries, a key and a value.
    assert q.tolist() == [*range(16), *range(32, 48)]
    assert k.tolist() == [*range(16, 24), *range(48, 56)]
    assert v.tolist() == [*range(24, 32), *range(56, 64)]
    assert torch.equal(qkv.join(parts), torch.arange(64))
    gated = weights["decoder.layers.0.mlp.linear_fc1.weight"].split(torch.arange(96))
    assert [part[0].item() for part in gated.values()] == [0, 48]
    padded = weights["embedding.word_embeddings.weight"].split(torch.ones(72, 32))
    assert padded["model.embed_tokens.weight"].shape == (64, 32)


def test_a_family_is_an_object_in_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = LlamaLike(
        architecture="AnotherForCausalLM",
        model_type="another",
        models="another's models",
        own_fields={"qk_layernorm": False, "layernorm_zero_centered_gamma": True},
        may_have_biases=False,
        default_head_dim=64,
    )
    monkeypatch.setattr(families, "FAMILIES", (another, *families.FAMILIES))
    model = read_config(tmp_path, architecture="AnotherForCausalLM", head_dim=None)
    assert (model.layernorm_zero_centered_gamma, model.kv_channels) == (True, 64)
    assert families.find_family(model) is another
    assert config_json(model, torch.float32, {})["architectures"] == ["AnotherForCausalLM"]
