import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.nn import functional

from bridge.training import cpu
from bridge.training.transformer.local_layers import LayerNorm, LocalAttention, RMSNorm
from ranks import run_ranks

HEADS, GROUPS, CHANNELS = 4, 2, 8


def make_config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HEADS * CHANNELS,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(values | changes))


def make_attention(
    mask_type: AttnMaskType = AttnMaskType.causal,
    group: Any = None,
    tensor_group: Any = None,
    **changes: Any,
) -> LocalAttention:
    groups: Any = SimpleNamespace(tp=tensor_group, cp=group)
    return LocalAttention(make_config(**changes), 1, mask_type, "self", pg_collection=groups)


def random_qkv(length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        shape = (length, batch, heads, CHANNELS)
        return torch.randn(shape, generator=generator, requires_grad=True)

    return draw(HEADS), draw(GROUPS), draw(GROUPS)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float = CHANNELS**-0.5
) -> Tensor:
    """Compute softmax attention; `hidden` is True for keys that a query does not see."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2)


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def test_causal_attention_with_query_groups_is_the_plain_softmax() -> None:
    query, key, value = random_qkv(6)
    expected = plain_attention(query, key, value, causal_mask(6))
    torch.testing.assert_close(make_attention()(query, key, value), expected)


def test_attention_without_mask_sees_every_key() -> None:
    query, key, value = random_qkv(6)
    expected = plain_attention(query, key, value, torch.zeros(6, 6, dtype=torch.bool))
    torch.testing.assert_close(make_attention(AttnMaskType.no_mask)(query, key, value), expected)


@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.arbitrary])
def test_a_boolean_mask_hides_keys_and_causal_attention_stays_causal(
    mask_type: AttnMaskType,
) -> None:
    query, key, value = random_qkv(6)
    hidden = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden &= ~torch.eye(6, dtype=torch.bool)
    output = make_attention(mask_type)(query, key, value, hidden)
    both = hidden | causal_mask(6) if mask_type is AttnMaskType.causal else hidden
    torch.testing.assert_close(output, plain_attention(query, key, value, both))


def test_the_window_limits_how_far_back_a_query_sees() -> None:
    query, key, value = random_qkv(8)
    output = make_attention(window_size=(2, 0))(query, key, value)
    too_old = torch.ones(8, 8, dtype=torch.bool).tril(-3)
    torch.testing.assert_close(output, plain_attention(query, key, value, too_old | causal_mask(8)))


def test_softmax_scale_replaces_the_usual_one() -> None:
    query, key, value = random_qkv(6)
    groups: Any = SimpleNamespace(tp=None, cp=None)
    attention = LocalAttention(
        make_config(), 1, AttnMaskType.causal, "self", softmax_scale=0.7, pg_collection=groups
    )
    expected = plain_attention(query, key, value, causal_mask(6), scale=0.7)
    torch.testing.assert_close(attention(query, key, value), expected)


def test_packed_sequences_are_the_sequences_apart() -> None:
    query, key, value = random_qkv(9, batch=1)
    ends = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    attention = make_attention()
    output = attention(*(x.squeeze(1) for x in (query, key, value)), packed_seq_params=packed)
    apart = [
        attention(query[start:end], key[start:end], value[start:end])
        for start, end in ((0, 4), (4, 5), (5, 9))
    ]
    torch.testing.assert_close(output, torch.cat(apart))
    with pytest.raises(ValueError, match="attention_mask: the sequences are packed"):
        attention(
            *(x.squeeze(1) for x in (query, key, value)), causal_mask(9), packed_seq_params=packed
        )


def test_dropout_zeroes_weights_and_scales_the_others() -> None:
    rate, length, batch = 0.25, 64, 8

    def on_a_rank() -> tuple[Tensor, Tensor, Tensor]:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        attention = make_attention(AttnMaskType.no_mask, attention_dropout=rate)
        # With equal scores and one-hot values of the positions the output is the weights.
        query = torch.zeros(length, batch, HEADS, length)
        value = torch.eye(length)[:, None, None].expand(-1, batch, GROUPS, -1)
        first = attention(query, query[:, :, :GROUPS], value)
        again = attention(query, query[:, :, :GROUPS], value)
        evaluated = attention.eval()(query, query[:, :, :GROUPS], value)
        return first, again, evaluated

    first, again, evaluated = run_ranks(1, on_a_rank)[0]
    kept = first != 0
    torch.testing.assert_close(first[kept].mean(), torch.tensor(1 / length / (1 - rate)))
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=0.005)
    assert not torch.equal(first, again)
    shaped = kept.reshape(length, batch, HEADS, length)
    assert not torch.equal(shaped[:, 0], shaped[:, 1])
    assert not torch.equal(shaped[:, :, 0], shaped[:, :, 1])
    torch.testing.assert_close(evaluated, torch.full_like(evaluated, 1 / length))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_is_the_same_on_two_tensor_parallel_ranks(sequence_parallel: bool) -> None:
    def attend(ranks: int) -> list[Tensor]:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        attention = make_attention(
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            attention_dropout=0.5,
            tensor_model_parallel_size=ranks,
            sequence_parallel=sequence_parallel and ranks > 1,
        )
        rank = parallel_state.get_tensor_model_parallel_rank()
        parts = [x.chunk(ranks, dim=2)[rank] for x in random_qkv(16)]
        return [attention(*parts).detach() for _ in range(2)]

    (alone,) = run_ranks(1, attend, 1)
    two = run_ranks(2, attend, 2)
    for call in range(2):
        together = torch.cat([of_rank[call] for of_rank in two], dim=2)
        torch.testing.assert_close(together, alone[call])
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize(
    "changes", [{"softmax_type": "off-by-one"}, {"qk_clip": True}], ids=lambda c: next(iter(c))
)
def test_features_that_the_kernel_lacks_are_rejected_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"model.{next(iter(changes))}"):
        make_attention(**changes)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_two_context_parallel_ranks_are_one_rank_gradients_too(dropout: float) -> None:
    length = 8

    def alone() -> tuple[Tensor, list[Tensor]]:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        inputs = random_qkv(length)
        output = make_attention(attention_dropout=dropout)(*inputs)
        output.square().sum().backward()
        return output.detach(), [x.grad for x in inputs if x.grad is not None]

    def rank_part() -> tuple[Tensor, list[Tensor]]:
        parallel_state.initialize_model_parallel(context_parallel_size=2)
        group = parallel_state.get_context_parallel_group()
        cut = get_batch_on_this_cp_rank(
            {
                name: x.detach().transpose(0, 1)
                for name, x in zip("qkv", random_qkv(length), strict=True)
            },
            is_hybrid_cp=False,
            cp_group=group,
        )
        parts = [cut[name].transpose(0, 1).requires_grad_() for name in "qkv"]
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        output = make_attention(group=group, attention_dropout=dropout)(*parts)
        output.square().sum().backward()
        return output.detach(), [part.grad for part in parts]

    def whole_again(parts: list[Tensor]) -> Tensor:
        (a, d), (b, c) = (part.chunk(2) for part in parts)
        return torch.cat([a, b, c, d])

    outputs, gradients = zip(*run_ranks(2, rank_part), strict=True)
    ((expected, expected_gradients),) = run_ranks(1, alone)
    torch.testing.assert_close(whole_again(list(outputs)), expected)
    for parts, gradient in zip(zip(*gradients, strict=True), expected_gradients, strict=True):
        torch.testing.assert_close(whole_again(list(parts)), gradient)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_two_context_parallel_ranks_attend_within_packed_documents_as_one_rank(
    dropout: float,
) -> None:
    # Of different lengths, an empty one among them.
    ends = torch.tensor([0, 4, 12, 12, 20], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    # By hand: of each document the first and the last quarter, and the two between.
    places = ([0, 3, 4, 5, 10, 11, 12, 13, 18, 19], [1, 2, 6, 7, 8, 9, 14, 15, 16, 17])

    def attend(ranks: int) -> tuple[Tensor, list[Tensor]]:
        parallel_state.initialize_model_parallel(context_parallel_size=ranks)
        group = parallel_state.get_context_parallel_group()
        mine = places[group.rank()] if ranks > 1 else list(range(20))
        parts = [x.detach()[mine, 0].requires_grad_() for x in random_qkv(20, batch=1)]
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        attention = make_attention(group=group, attention_dropout=dropout)
        output = attention(*parts, packed_seq_params=packed)
        output.square().sum().backward()
        return output.detach(), [part.grad for part in parts if part.grad is not None]

    ((expected, expected_gradients),) = run_ranks(1, attend, 1)
    for rank, (output, gradients) in enumerate(run_ranks(2, attend, 2)):
        torch.testing.assert_close(output, expected[places[rank]])
        for gradient, whole in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, whole[places[rank]])


def test_context_parallelism_rejects_masks() -> None:
    two_ranks: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    attention = make_attention(group=two_ranks)
    query, key, value = random_qkv(4, batch=1)
    with pytest.raises(ValueError, match="attention_mask is not supported with context_parallel"):
        attention(query, key, value, causal_mask(4))


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize(
    ("norm_type", "reference"),
    [(RMSNorm, functional.rms_norm), (LayerNorm, functional.layer_norm)],
)
def test_a_norm_starts_as_torchs_own(
    norm_type: type[RMSNorm | LayerNorm], reference: Callable[..., Tensor], zero_centered: bool
) -> None:
    config = make_config(layernorm_zero_centered_gamma=zero_centered)
    norm = norm_type(config=config, hidden_size=32, eps=1e-3)
    x = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x), reference(x, (32,), eps=1e-3))
    with torch.no_grad():
        norm.weight.add_(0.5)
    torch.testing.assert_close(norm(x), 1.5 * reference(x, (32,), eps=1e-3))


def test_a_norm_gives_the_weights_type_for_a_float32_residual() -> None:
    config = make_config(params_dtype=torch.bfloat16, bf16=True)
    for norm_type in (RMSNorm, LayerNorm):
        assert norm_type(config, 32)(torch.randn(2, 32)).dtype == torch.bfloat16


def test_the_norms_gradient_is_summed_over_sequence_parallel_ranks() -> None:
    x = torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(0))

    def rank_gradients() -> list[Tensor]:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        config = make_config(tensor_model_parallel_size=2, sequence_parallel=True)
        norm = LayerNorm(config, 32)
        model = torch.nn.ModuleList([norm])
        part = x.chunk(2)[dist.get_rank()]
        norm(part).square().sum().backward()
        parameters: list[Any] = list(model.parameters())
        for parameter in parameters:
            parameter.main_grad = parameter.grad
        model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)  # type: ignore[assignment]
        groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        _allreduce_non_tensor_model_parallel_grads([model], config, groups.tp)
        return [parameter.main_grad for parameter in parameters]

    whole = LayerNorm(make_config(), 32)
    whole(x).square().sum().backward()
    for rank in run_ranks(2, rank_gradients):
        for gradient, parameter in zip(rank, whole.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_the_parameters_of_a_norm_are_built_on_the_current_device() -> None:
    with cpu.cpu_training():
        norm = RMSNorm(make_config(use_cpu_initialization=False), 32)
    assert norm.weight.device.type == "cpu"
