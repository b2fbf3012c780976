"""The forward step of GPT pretraining.

A microbatch is a dict of host tensors: ``tokens``, ``labels`` and ``position_ids``, each
[batch, sequence], and ``loss_mask`` of that shape (not zero where the prediction counts);
optionally ``padding_mask`` of that shape (True where the token is padding), and ``attention_mask``
or, for documents packed into one sequence, ``cu_seqlens`` (with ``max_seqlen`` if wanted).

Where packed documents are padded each for itself, ``cu_seqlens_padded`` says where they begin in
the sequence, and ``cu_seqlens`` counts their own tokens up. Megatron Bridge's names for the two are
taken as well: ``cu_seqlens`` and ``cu_seqlens_unpadded``.

The loss mask weighs predictions: the next token's, and those of multi-token prediction. The padding
mask is for the experts' routers, whose auxiliary losses are over real tokens, those of a prompt
included; without it every position is taken for real.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from bridge.training.losses import masked_token_loss
from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model

if TYPE_CHECKING:
    from bridge.training.state import GlobalState

_INPUTS = ("tokens", "position_ids")
_TARGETS = ("labels", "loss_mask")
_PACKING = ("cu_seqlens", "cu_seqlens_padded", "cu_seqlens_unpadded")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a microbatch, on the device; None where the stage has no use for it."""

    tokens: torch.Tensor | None = None
    """Token ids, [batch, sequence / context-parallel size]."""
    position_ids: torch.Tensor | None = None
    """Positions, of the same shape."""
    labels: torch.Tensor | None = None
    """The tokens to predict, of the same shape."""
    loss_mask: torch.Tensor | None = None
    """Not zero where the prediction counts, of the same shape."""
    padding_mask: torch.Tensor | None = None
    """True where the token is padding, of the same shape; None if nothing is marked."""
    attention_mask: torch.Tensor | None = None
    """True where attention is forbidden; None for plain causal attention."""
    packed_seq_params: PackedSeqParams | None = None
    """Where the packed documents begin and end, on every stage."""


def forward_step(
    global_state: "GlobalState",
    data_iterator: Iterator[Mapping[str, Any]],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, partial[Any]]:
    """Run one microbatch through a model chunk.

    Args:
        global_state: The state of the run.
        data_iterator: Yields this data-parallel rank's microbatches; every pipeline stage has one.
        model: The model chunk, as wrapped for training.
        return_schedule_plan: Return the plan of the forward pass instead of running it, for
            megatron-core's overlap of expert-parallel communication.

    Returns:
        The output of the chunk (on the last stage the loss of each token, [batch, sequence]) or
        its plan, and the loss function of that output.

    Raises:
        UsageError: The microbatch lacks something, it is packed and the model predicts several
            tokens, or a plan was asked for without ``model.overlap_moe_expert_parallel_comm``.
    """
    chunk = unwrap_model(model)
    timers = global_state.timers
    timers("batch-generator", log_level=2).start()
    batch = get_batch(
        data_iterator,
        inputs=chunk.pre_process or chunk.mtp_process,
        targets=chunk.post_process,
        routers=chunk.config.num_moe_experts is not None,
        cp_group=chunk.pg_collection.cp,
    )
    timers("batch-generator").stop()
    if batch.packed_seq_params is not None and chunk.config.mtp_num_layers:
        # megatron-core's multi-token prediction reads every boundary from the device by itself,
        # and takes cu_seqlens for the layout where cu_seqlens_padded is.
        raise UsageError(
            "cu_seqlens: the documents are packed, which multi-token prediction does not support; "
            "give samples that are not packed, or set model.mtp_num_layers=null"
        )

    arguments = {
        "input_ids": batch.tokens,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
        "packed_seq_params": batch.packed_seq_params,
    }
    optional = {"loss_mask": batch.loss_mask, "padding_mask": _padding_of_stage(batch, chunk)}
    loss_function = partial(masked_token_loss, batch.loss_mask)
    if return_schedule_plan:
        if not chunk.config.overlap_moe_expert_parallel_comm:
            raise UsageError(
                "return_schedule_plan: a schedule plan was asked for, and "
                "model.overlap_moe_expert_parallel_comm is False; set it to True"
            )
        if batch.padding_mask is not None:
            # It gets as far as the plan: megatron-core calls the routers without it.
            raise UsageError(
                "padding_mask: routers do not see it under model.overlap_moe_expert_parallel_comm; "
                "set that to False, or give no padding_mask and let padding count as real tokens"
            )
        return chunk.build_schedule_plan(**arguments, **optional), loss_function
    forward = type(chunk).forward
    arguments |= {name: value for name, value in optional.items() if _takes(forward, name)}
    return model(**arguments), loss_function


def get_batch(
    data_iterator: Iterator[Mapping[str, Any]],
    *,
    inputs: bool = True,
    targets: bool = True,
    routers: bool = False,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> Batch:
    """Read the next microbatch and move what this pipeline stage needs to the device.

    Every stage reads, also one in the middle: only the data knows whether documents are packed,
    and attention needs to know where they end on all stages. Nothing here waits for the device.

    Args:
        data_iterator: Yields microbatches; tensors on the host.
        inputs: Take ``tokens`` and ``position_ids`` (the first stage, and where multi-token
            prediction embeds the next tokens).
        targets: Take ``labels`` and ``loss_mask`` (the last stage).
        routers: Take ``padding_mask``, if there is one (every stage of a model with experts).
        cp_group: Ranks that share each sequence; each takes its two chunks of the zigzag.

    Raises:
        UsageError: There is no iterator, a key is missing, the packing metadata is wrong, or the
            padding mask contradicts the loss mask.
    """
    if data_iterator is None:
        raise UsageError(
            "data_iterator is None: every pipeline stage reads the microbatches, because packing "
            "metadata is needed on all of them; give each rank an iterator over the same samples"
        )
    sample = next(data_iterator)
    names = (_INPUTS if inputs else ()) + (_TARGETS if targets else ())
    missing = [name for name in names if sample.get(name) is None]
    if missing:
        raise UsageError(
            f"the microbatch has no {' and no '.join(missing)} (it has {', '.join(sample)}); a "
            "dataset for gpt_step gives tokens, position_ids, labels and loss_mask"
        )
    shards = 1 if cp_group is None else cp_group.size()
    packing = _Packing.of(sample, shards)
    tensors = {name: sample[name] for name in names}
    if sample.get("attention_mask") is not None:
        tensors["attention_mask"] = sample["attention_mask"]
    if routers and sample.get("padding_mask") is not None:
        tensors["padding_mask"] = _padding_mask(sample)
    if shards > 1:
        assert cp_group is not None
        tensors = _shard(tensors, packing, cp_group)
    device = torch.cuda.current_device()
    on_device = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
    return Batch(**on_device, packed_seq_params=packing.params(device) if packing else None)


def _padding_mask(sample: Mapping[str, Any]) -> torch.Tensor:
    """Read the padding mask of a microbatch; one that is the wrong way round is refused."""
    mask: torch.Tensor = sample["padding_mask"]
    counted: torch.Tensor | None = sample.get("loss_mask")
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise UsageError(
            f"padding_mask has shape {tuple(mask.shape)} and {mask.dtype}; give [batch, sequence] "
            "and torch.bool"
        )
    if counted is None or mask.is_cuda or counted.is_cuda:
        return mask
    if mask.shape != counted.shape or bool((mask & (counted != 0)).any()):
        raise UsageError(
            "padding_mask contradicts loss_mask: it is True at padding, where loss_mask must be 0, "
            f"and of the same shape (they are {tuple(mask.shape)} and {tuple(counted.shape)})"
        )
    return mask


def _padding_of_stage(batch: Batch, chunk: Any) -> torch.Tensor | None:
    """Return the padding mask as the chunk's layers need it: for the positions of this rank."""
    mask = batch.padding_mask
    # Where the chunk embeds the tokens, megatron-core cuts their mask as well.
    if mask is None or not chunk.config.sequence_parallel or chunk.pre_process:
        return mask
    group = chunk.pg_collection.tp
    part: torch.Tensor = mask.chunk(group.size(), dim=1)[group.rank()]
    return part.contiguous()


@dataclass(frozen=True, kw_only=True)
class _Packing:
    """Documents that share one sequence: where they end, without and with padding; on the host."""

    cu_seqlens: torch.Tensor
    cu_seqlens_padded: torch.Tensor | None
    max_seqlen: int

    @classmethod
    def of(cls, sample: Mapping[str, Any], shards: int) -> "_Packing | None":
        """Read and check the packing metadata of a microbatch; None if it is not packed."""
        given = [name for name in _PACKING if sample.get(name) is not None]
        if not given:
            return None
        if "cu_seqlens" not in given or len(given) == len(_PACKING):
            raise UsageError(
                f"the microbatch has {' and '.join(given)}: give cu_seqlens and, where documents "
                "are padded each for itself, one of cu_seqlens_padded and cu_seqlens_unpadded"
            )
        if sample.get("attention_mask") is not None:
            raise UsageError(
                "attention_mask: the documents are packed, and cu_seqlens says what each token "
                "sees, so that a mask would have no effect; leave it out, or do not pack"
            )
        real, padded = _boundaries(sample, "cu_seqlens"), None
        if "cu_seqlens_padded" in given:
            padded = _boundaries(sample, "cu_seqlens_padded")
        elif "cu_seqlens_unpadded" in given:
            real, padded = _boundaries(sample, "cu_seqlens_unpadded"), real
        laid_out = real if padded is None else padded
        _check_layout(laid_out, sample, shards)
        if padded is not None:
            _check_tokens(real, padded)
        else:
            # Datasets repeat the last boundary so that samples stack: those documents are empty.
            real = laid_out = torch.unique_consecutive(real)
        longest = int((laid_out[1:] - laid_out[:-1]).max())
        return cls(
            cu_seqlens=real,
            cu_seqlens_padded=padded,
            max_seqlen=max(longest, int(sample.get("max_seqlen") or 0)),
        )

    def params(self, device: Any) -> PackedSeqParams:
        """Return megatron-core's form of it, its tensors on `device`."""
        real = self.cu_seqlens.to(device, non_blocking=True)
        padded = (
            None
            if self.cu_seqlens_padded is None
            else self.cu_seqlens_padded.to(device, non_blocking=True)
        )
        # megatron-core's annotations leave out that these may be None.
        padding: dict[str, Any] = {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=real,
            cu_seqlens_kv=real,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_kv=self.max_seqlen,
            **padding,
        )

    def zigzag(self, rank: int, shards: int) -> torch.Tensor:
        """Return the positions of this context-parallel rank: two chunks of every document.

        Each document is cut in ``2 * shards`` chunks and rank r takes chunks r and
        ``2 * shards - 1 - r``, as Transformer Engine's attention over packed sequences expects.
        """
        laid_out = self.cu_seqlens if self.cu_seqlens_padded is None else self.cu_seqlens_padded
        pieces = []
        for start, end in zip(laid_out[:-1].tolist(), laid_out[1:].tolist(), strict=True):
            chunk = (end - start) // (2 * shards)
            for index in (rank, 2 * shards - 1 - rank):
                pieces.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
        return torch.cat(pieces)


def _boundaries(sample: Mapping[str, Any], name: str) -> torch.Tensor:
    value = torch.as_tensor(sample[name])
    if value.is_cuda:
        raise UsageError(f"{name} is on the device; leave it on the host, where it is read")
    if value.dim() == 2 and value.shape[0] == 1:
        value = value[0]
    if value.dim() != 1:
        raise UsageError(
            f"{name} has shape {tuple(value.shape)}: packed documents fill a sequence by "
            "themselves, so set train.micro_batch_size=1 and pack more into dataset.seq_length"
        )
    return value.to(torch.int32)


def _check_layout(laid_out: torch.Tensor, sample: Mapping[str, Any], shards: int) -> None:
    """Refuse boundaries that do not cover the sequence or cannot be cut for context parallelism."""
    lengths = laid_out[1:] - laid_out[:-1]
    if len(laid_out) < 2 or int(laid_out[0]) != 0 or bool((lengths < 0).any()):
        raise UsageError(
            f"cu_seqlens: {laid_out.tolist()} must begin with 0 and never fall: it holds the "
            "start of each packed document and the end of the last"
        )
    for name in (*_INPUTS, *_TARGETS):
        tensor = sample.get(name)
        if tensor is not None and (tensor.shape[0] != 1 or tensor.shape[1] != int(laid_out[-1])):
            raise UsageError(
                f"cu_seqlens: the packed documents end at {int(laid_out[-1])}, and {name} has "
                f"shape {tuple(tensor.shape)}; packing needs train.micro_batch_size=1 and "
                "documents (padding counted as one) that cover the whole sequence"
            )
    if shards > 1 and bool((lengths % (2 * shards)).any()):
        raise UsageError(
            f"cu_seqlens: the lengths {lengths.tolist()} of the packed documents are not all "
            f"multiples of {2 * shards}, which model.context_parallel_size={shards} needs; pad "
            "each document and give the padded boundaries as cu_seqlens_padded"
        )


def _check_tokens(real: torch.Tensor, padded: torch.Tensor) -> None:
    """Reject documents with more tokens of their own than there is room for in the sequence."""
    lengths = real[1:] - real[:-1]
    if (
        len(real) != len(padded)
        or int(real[0]) != 0
        or bool((lengths < 0).any())
        or bool((lengths > padded[1:] - padded[:-1]).any())
    ):
        raise UsageError(
            f"cu_seqlens: {real.tolist()} must begin with 0, never fall, and count for each "
            f"document no more tokens than it has with its padding, {padded.tolist()}"
        )


def _shard(
    tensors: dict[str, torch.Tensor],
    packing: _Packing | None,
    cp_group: torch.distributed.ProcessGroup,
) -> dict[str, torch.Tensor]:
    """Return this context-parallel rank's part of each tensor."""
    if packing is None:
        shard: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(
            dict(tensors), is_hybrid_cp=False, cp_group=cp_group
        )
        return shard
    index = packing.zigzag(cp_group.rank(), cp_group.size())
    return {name: tensor.index_select(1, index) for name, tensor in tensors.items()}


@cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a model's forward has a parameter of this name."""
    parameters = inspect.signature(forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
