"""Norms and attention for a layer spec without Transformer Engine, on a CPU or a GPU.

megatron-core's own local norms reject sequence parallelism, and its local attention rejects context
parallelism and packed sequences. These support all three, so every layout can be tried on a CPU.
Letters in shapes: s sequence, b batch, n attention heads and g query groups on this rank,
d channels of a head, t tokens of a pack.
"""

import math
from typing import Any, override

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn import functional

from bridge.training.usage_error import UsageError

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class _Norm(torch.nn.Module):
    """The common base of both norms: a gain, for sequence parallelism and zero-centered gamma."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = self._parameter(hidden_size, fill=0.0 if self.zero_centered else 1.0)

    def _parameter(self, size: int, fill: float) -> torch.nn.Parameter:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        values = torch.full((size,), fill, dtype=self.config.params_dtype, device=device)
        parameter = torch.nn.Parameter(values)
        # Each tensor-parallel rank has a shard of the sequence. megatron-core sums the gradients of
        # parameters with this mark over the ranks.
        parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def _gain(self) -> Tensor:
        # Callers convert it to the input's type: a residual stream may be float32.
        return self.weight + 1 if self.zero_centered else self.weight


class RMSNorm(_Norm):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension (arXiv:1910.07467)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` ``[..., hidden]``; the result has the weight's type."""
        gain = self._gain().to(x.dtype)
        normalized = functional.rms_norm(x, self.weight.shape, gain, self.eps)
        return normalized.to(self.weight.dtype)


class LayerNorm(_Norm):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = self._parameter(hidden_size, fill=0.0)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` ``[..., hidden]``; the result has the weight's type."""
        gain, bias = self._gain().to(x.dtype), self.bias.to(x.dtype)
        normalized = functional.layer_norm(x, self.weight.shape, gain, bias, self.eps)
        return normalized.to(self.weight.dtype)


class LocalAttention(torch.nn.Module):
    """Core attention on torch's scaled_dot_product_attention.

    With context parallelism the keys and values of the full sequence are gathered on every rank,
    whatever ``cp_comm_type`` is. The sequence is sharded like in megatron-core's
    ``get_batch_on_this_cp_rank``, each document of a pack separately. A mask costs memory for each
    pair of positions, so long contexts need Transformer Engine. Plain causal attention has no mask.

    Dropout is drawn for all heads and positions of a microbatch, equally on every tensor- and
    context-parallel rank, and each takes its shard: so it does not depend on the number of ranks.
    It costs memory for each pair of positions of each head, like megatron-core's own local
    attention.

    Raises:
        UsageError: The config has a softmax or a clipping that torch's kernel lacks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        _check_supported(config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.config = config
        self.attn_mask_type = attn_mask_type
        self.tensor_parallel_group = pg_collection.tp
        self.context_parallel_group = pg_collection.cp
        head_size = config.kv_channels or config.hidden_size // config.num_attention_heads
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(head_size)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(
            config.window_size,
            config.window_attn_skip_freq,  # type: ignore[arg-type]  # None is handled first
            layer_number,
        )
        self.window = config.window_size if windowed else None

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute the attention of each query over the keys.

        Args:
            query: ``[s, b, n, d]``, or ``[t, n, d]`` when packed.
            key: ``[s, b, g, d]``, or ``[t, g, d]`` when packed.
            value: As `key`; its d may differ.
            attention_mask: Boolean, True where a key is masked (megatron-core's convention),
                broadcastable to ``[b, n, s, s]``. Causal attention stays causal.
            attn_mask_type: Replaces that of the constructor.
            attention_bias: Not supported.
            packed_seq_params: Ends of the sequences of a pack; each attends only to itself.

        Returns:
            ``[s, b, n * d]``, or ``[t, 1, n * d]`` when packed.

        Raises:
            UsageError: For a combination that is not supported.
        """
        if attention_bias is not None:
            raise UsageError("LocalAttention takes no attention_bias; use Transformer Engine")
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        ends = None
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            if attention_mask is not None:
                raise UsageError(
                    "attention_mask: the sequences are packed, and their boundaries say what each "
                    "token sees; pass None"
                )
            ends = _ends_of_documents(packed_seq_params, causal)
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        group = self.context_parallel_group
        if _size(group) > 1:
            if attention_mask is not None:
                raise UsageError(
                    "attention_mask is not supported with context_parallel_size > 1, where each "
                    "rank sees its part of the sequence only; pass None (causal attention needs "
                    "no mask)"
                )
            positions = _positions_of_ranks(query.shape[0], ends, group, query.device)
            mask = self._mask_of_documents(ends, positions, causal)
            key, value = _gather_sequence(key, value, group)
            return self._attend(query, key, value, mask, positions=positions)
        if ends is not None:
            everywhere = torch.arange(query.shape[0], device=query.device)
            mask = self._mask_of_documents(ends, (everywhere, everywhere), causal)
        elif attention_mask is None and self.window is None:
            return self._attend(query, key, value, None, is_causal=causal)
        else:
            mask = self._dense_mask(query, key, attention_mask, causal)
        return self._attend(query, key, value, mask)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        is_causal: bool = False,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend where `mask` is True; `positions` are those of sharded queries and keys."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.training and self.dropout > 0.0:
            if is_causal:
                everywhere = torch.arange(query.shape[2], device=query.device)
                mask = self._position_mask(everywhere, everywhere, causal=True)
            output = self._attend_with_dropout(query, key, value, mask, positions)
        else:
            output = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return output.permute(2, 0, 1, 3).flatten(2)

    def _attend_with_dropout(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        positions: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attend with an explicit softmax, as torch's kernel draws a dropout mask of its own."""
        heads_per_group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3)).float() * self.softmax_scale
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).masked_fill(~self._draw_kept(scores, positions), 0.0)
        return (weights / (1.0 - self.dropout)).to(value.dtype) @ value

    def _draw_kept(self, scores: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
        """Draw this rank's mask of the attention weights that dropout keeps, ``[b, n, s, s]``.

        The context-parallel ranks' keys are gathered: the last dimension is the full sequence.
        """
        tensor = self.tensor_parallel_group
        batch, heads, _, length = scores.shape
        ones = scores.new_ones(batch, heads * _size(tensor), length, length)
        if self.config.sequence_parallel:
            # The transformer block has forked to a random stream that differs between the ranks.
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                kept = functional.dropout(ones, self.dropout) > 0
        else:
            kept = functional.dropout(ones, self.dropout) > 0
        if _size(tensor) > 1:
            kept = kept.narrow(1, tensor.rank() * heads, heads)
        if positions is not None:
            queries, keys = positions
            kept = kept[:, :, queries[:, None], keys]
        return kept

    def _position_mask(self, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
        """Return the keys that each query attends to, from their positions; None for all."""
        if not causal and self.window is None:
            return None
        distance = key[None, :] - query[:, None]
        left, right = self.window or (-1, -1)
        if causal:
            right = 0
        visible = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            visible &= distance >= -left
        if right >= 0:
            visible &= distance <= right
        return visible

    def _dense_mask(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None, causal: bool
    ) -> Tensor | None:
        """Return the mask of full sequences: the caller's, the causal one and the window."""
        queries = torch.arange(query.shape[0], device=query.device)
        keys = torch.arange(key.shape[0], device=query.device)
        visible = self._position_mask(queries, keys, causal)
        if attention_mask is None:
            return visible
        return ~attention_mask if visible is None else visible & ~attention_mask

    def _mask_of_documents(
        self, ends: Tensor | None, positions: tuple[Tensor, Tensor], causal: bool
    ) -> Tensor | None:
        """Return the mask in which `positions` attend to their own document."""
        visible = self._position_mask(*positions, causal)
        if ends is None:
            return visible
        queries, keys = (_documents(ends, of_side) for of_side in positions)
        same = queries[:, None] == keys[None, :]
        return same if visible is None else same & visible


def _check_supported(config: TransformerConfig) -> None:
    remedy = "; use Transformer Engine's attention for it"
    if config.softmax_type != "vanilla":
        raise UsageError(f"model.softmax_type={config.softmax_type!r} is not supported{remedy}")
    if config.qk_clip:
        raise UsageError(f"model.qk_clip=True is not supported{remedy}")


def _size(group: Any) -> int:
    return 1 if group is None else int(group.size())


def _ends_of_documents(packed: PackedSeqParams, causal: bool) -> Tensor:
    """Return the boundaries of the documents of a pack, padding included."""
    if packed.cu_seqlens_q_padded is None:
        return packed.cu_seqlens_q
    if not causal:
        raise UsageError("padding between packed sequences needs causal attention here")
    return packed.cu_seqlens_q_padded


def _documents(ends: Tensor, positions: Tensor) -> Tensor:
    """Return the index of the document of each position; empty documents count."""
    return torch.searchsorted(ends[1:].contiguous(), positions.to(ends.dtype), right=True)


def _positions_of_ranks(
    length: int, ends: Tensor | None, group: dist.ProcessGroup, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the positions in the sequence of this rank's `length` tokens, and of all ranks'.

    A document is divided into twice as many chunks as there are ranks; rank r has the r-th from
    either end. Without `ends` the sequence is one document.
    """
    size = group.size()
    if ends is None:
        ends = torch.tensor([0, size * length], device=device)
    starts = (ends // size).long()  # Of a rank's shard of each document, in its tokens.
    offsets = torch.arange(length, device=device)
    document = _documents(starts, offsets)
    chunk = (starts[document + 1] - starts[document]) // 2
    within = offsets - starts[document]
    ranks = torch.arange(size, device=device)[:, None]
    # Tokens after the first chunk are in the second one, which counts from the other end.
    number = torch.where(within < chunk, ranks, 2 * size - 1 - ranks)
    positions = ends[document] + number * chunk + within % chunk
    return positions[group.rank()], positions.flatten()


def _gather_sequence(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather keys and values ``[s, b, g, d]`` of all ranks along s, in one collective."""
    both = torch.cat([key, value], dim=-1)
    gathered: Tensor = _GatherSequence.apply(both, group)  # type: ignore[no-untyped-call]
    gathered_key, gathered_value = gathered.split([key.shape[-1], value.shape[-1]], dim=-1)
    return gathered_key, gathered_value


class _GatherSequence(torch.autograd.Function):
    """All-gather along the first dimension; the ranks' gradients of a shard are summed."""

    @staticmethod
    @override
    def forward(ctx: Any, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = shard.new_empty((shard.shape[0] * group.size(), *shard.shape[1:]))
        dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
        return gathered

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        shard = gradient.new_empty((gradient.shape[0] // ctx.group.size(), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(shard, gradient.contiguous(), group=ctx.group)
        return shard, None
