import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bridge.gpt.model_config import GPTModelConfig
from bridge.training.gpt_step import forward_step
from bridge.training.state import GlobalState
from bridge.training.transformer.local_layers import LayerNorm, LocalAttention, RMSNorm
from gpt_models import SEQUENCE, build_chunks, losses_of, microbatch, run_of, tiny_gpt
from ranks import run_ranks

MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
INTERLEAVED = {
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "overlap_p2p_comm": True,
    "batch_p2p_comm": False,
}


def losses_under(changes: dict[str, Any], length: int = SEQUENCE) -> list[list[float]]:
    model = tiny_gpt(**changes)
    step = partial(forward_step, GlobalState(run_of(model)))
    return losses_of(step, build_chunks(model), [microbatch(i, length=length) for i in range(4)])


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """Rotate [batch, heads, sequence, channels] (RoPE, arXiv:2104.09864), base 10000."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[2]), 10000.0 ** (-torch.arange(half) / half))
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ],
        -1,
    )


def reference_logits(weights: dict[str, Tensor], tokens: Tensor, model: GPTModelConfig) -> Tensor:
    """A Llama forward pass written from its definition, on the weights of the model under test."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    assert groups is not None
    size = model.hidden_size // heads
    x = weights["embedding.word_embeddings.weight"][tokens]
    batch, length, _ = x.shape
    for layer in range(model.num_layers):
        part = {
            name.removeprefix(f"decoder.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        normed = rms_norm(x, part["input_layernorm.weight"])
        # megatron-core keeps the heads of a group together: its queries, its key, its value.
        qkv = (normed @ part["self_attention.linear_qkv.weight"].T).view(
            batch, length, groups, heads // groups + 2, size
        )
        q = rotate(qkv[..., :-2, :].reshape(batch, length, heads, size).transpose(1, 2))
        k, v = (qkv[..., i, :].transpose(1, 2) for i in (-2, -1))
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (rotate(k), v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + attended @ part["self_attention.linear_proj.weight"].T
        gate, up = (
            rms_norm(x, part["pre_mlp_layernorm.weight"]) @ part["mlp.linear_fc1.weight"].T
        ).chunk(2, -1)
        x = x + (functional.silu(gate) * up) @ part["mlp.linear_fc2.weight"].T
    return rms_norm(x, weights["decoder.final_layernorm.weight"]) @ weights["output_layer.weight"].T


def test_local_model_computes_llama_as_it_is_defined() -> None:
    def body() -> float:
        model = tiny_gpt()
        (chunk,) = build_chunks(model)
        batch = microbatch(batch=3)
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if "norm" in name:  # ones would hide a norm with the wrong weight
                    parameter.uniform_(0.5, 1.5)
            logits = chunk(batch["tokens"], batch["position_ids"], None)
            expected = reference_logits(chunk.state_dict(), batch["tokens"], model)
        return float((logits - expected).abs().max() / expected.abs().max())

    assert run_ranks(1, body)[0] < 1e-5


@pytest.mark.parametrize(
    ("world_size", "layout", "model"),
    [
        pytest.param(
            2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}, id="tp-sp"
        ),
        pytest.param(2, INTERLEAVED, {"mtp_num_layers": 1}, id="pp-vpp-mtp"),
        pytest.param(2, {"context_parallel_size": 2}, {"qk_layernorm": True}, id="cp-qk-norm"),
        pytest.param(2, {"expert_model_parallel_size": 2}, MOE, id="ep"),
    ],
)
def test_layouts_agree_on_the_loss(
    world_size: int, layout: dict[str, Any], model: dict[str, Any]
) -> None:
    (alone,) = run_ranks(1, losses_under, model)
    by_rank = run_ranks(world_size, losses_under, layout | model)
    if "context_parallel_size" in layout:  # each rank has its part of every sequence
        found = torch.tensor(by_rank).sum(0).tolist()
    else:
        found = by_rank[-1]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "norm"),
    [
        ({"qk_layernorm": True}, RMSNorm),
        ({"normalization": "LayerNorm", "qk_layernorm": True}, LayerNorm),
        ({"mtp_num_layers": 1}, RMSNorm),
        (MOE, RMSNorm),
    ],
)
def test_every_norm_and_attention_of_a_local_model_is_ours(
    changes: dict[str, Any], norm: type[torch.nn.Module]
) -> None:
    def body() -> tuple[set[str], set[str]]:
        (chunk,) = build_chunks(tiny_gpt(**changes))
        named = list(chunk.named_modules())
        norms = {type(m).__name__ for n, m in named if n.endswith("norm") and list(m.parameters())}
        return norms, {type(m).__name__ for n, m in named if n.endswith("core_attention")}

    assert run_ranks(1, body)[0] == ({norm.__name__}, {LocalAttention.__name__})


def test_experts_are_in_the_layers_of_moe_layer_freq() -> None:
    def body() -> list[list[bool]]:
        model = tiny_gpt(**MOE, moe_layer_freq=[0, 1, 1, 0], **INTERLEAVED)
        return [
            [hasattr(layer.mlp, "router") for layer in chunk.decoder.layers]
            for chunk in build_chunks(model)
        ]

    assert run_ranks(2, body) == [[[False], [True]], [[True], [False]]]
