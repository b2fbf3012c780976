"""The forward step of GPT models.

A microbatch is a dict of host tensors:

    tokens, labels, position_ids  [batch, sequence]
    loss_mask                     [batch, sequence], not zero where the prediction counts
    padding_mask                  optional, [batch, sequence], True where the token is padding
    attention_mask                optional, True where attention is forbidden
    cu_seqlens                    in place of attention_mask, for documents packed into one
                                  sequence (`bridge.gpt.packed_documents`); max_seqlen optional

The loss mask weighs predictions: the next token's, and those of multi-token prediction. The padding
mask is for the experts' routers, whose auxiliary losses are over real tokens, those of prompts
included. Without it, every token is real.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from bridge.gpt.packed_documents import PackedDocuments
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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's shard of a microbatch, on the device; None where the stage does not need it."""

    tokens: torch.Tensor | None = None
    """Token ids, [batch, sequence / context-parallel size]."""
    position_ids: torch.Tensor | None = None
    """Positions, of the same shape."""
    labels: torch.Tensor | None = None
    """The tokens to predict, of the same shape."""
    loss_mask: torch.Tensor | None = None
    """Not zero where the prediction counts, of the same shape."""
    padding_mask: torch.Tensor | None = None
    """True where the token is padding, of the same shape; None if no token is."""
    attention_mask: torch.Tensor | None = None
    """True where attention is forbidden; None for plain causal attention."""
    packed_seq_params: PackedSeqParams | None = None
    """The boundaries of packed documents, on every stage."""


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
        # megatron-core's multi-token prediction has a host-device sync for every boundary, and uses
        # cu_seqlens where cu_seqlens_padded has the layout.
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
            # The plan takes it, but megatron-core calls the routers without it.
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
    """Read the next microbatch and move the tensors that this pipeline stage needs to the device.

    Every stage reads, also one in the middle: attention needs the boundaries of packed documents
    on all stages. There is no host-device sync.

    Args:
        data_iterator: Yields microbatches; tensors on the host.
        inputs: Take ``tokens`` and ``position_ids`` (the first stage, and where multi-token
            prediction embeds the next tokens).
        targets: Take ``labels`` and ``loss_mask`` (the last stage).
        routers: Take ``padding_mask``, if there is one (every stage of a model with experts).
        cp_group: Ranks that share each sequence; each takes two of its chunks.

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
    packing = PackedDocuments.read(sample, shards)
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
    return Batch(**on_device, packed_seq_params=packing.to_megatron(device) if packing else None)


def _padding_mask(sample: Mapping[str, Any]) -> torch.Tensor:
    """Return the padding mask of a microbatch; an inverted one is rejected."""
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
    """Return the shard of the padding mask that the chunk's layers need."""
    mask = batch.padding_mask
    # In a chunk that embeds the tokens, megatron-core cuts their mask as well.
    if mask is None or not chunk.config.sequence_parallel or chunk.pre_process:
        return mask
    group = chunk.pg_collection.tp
    part: torch.Tensor = mask.chunk(group.size(), dim=1)[group.rank()]
    return part.contiguous()


def _shard(
    tensors: dict[str, torch.Tensor],
    packing: PackedDocuments | None,
    cp_group: torch.distributed.ProcessGroup,
) -> dict[str, torch.Tensor]:
    """Return this context-parallel rank's shard of each tensor."""
    if packing is None:
        shard: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(
            dict(tensors), is_hybrid_cp=False, cp_group=cp_group
        )
        return shard
    index = packing.positions_of_shard(cp_group.rank(), cp_group.size())
    return {name: tensor.index_select(1, index) for name, tensor in tensors.items()}


@cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a model's forward has a parameter of this name."""
    parameters = inspect.signature(forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
