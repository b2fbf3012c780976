"""Documents packed into one sequence: their boundaries, and the positions of a shard.

A microbatch has ``cu_seqlens``, the start of each document and the end of the last. Where every
document is padded, ``cu_seqlens_padded`` has the boundaries in the sequence, and ``cu_seqlens``
counts the documents' own tokens. Megatron Bridge's names for these two are read as well:
``cu_seqlens`` and ``cu_seqlens_unpadded``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.packed_seq_params import PackedSeqParams

_BOUNDARIES = ("cu_seqlens", "cu_seqlens_padded", "cu_seqlens_unpadded")


@dataclass(frozen=True, kw_only=True)
class PackedDocuments:
    """The boundaries of the documents that share one sequence, on the host."""

    cu_seqlens: torch.Tensor
    """The start of each document's own tokens and the end of the last, counted without padding."""
    cu_seqlens_padded: torch.Tensor | None
    """The start of each document in the sequence and the end of the last; None without padding."""
    max_seqlen: int

    @classmethod
    def read(cls, sample: Mapping[str, Any], shards: int) -> "PackedDocuments | None":
        """Read and check the boundaries of a microbatch; return None if it is not packed.

        Args:
            sample: The microbatch.
            shards: The context-parallel size.

        Raises:
            UsageError: The boundaries are wrong, or there is an attention mask next to them.
        """
        given = [name for name in _BOUNDARIES if sample.get(name) is not None]
        if not given:
            return None
        if "cu_seqlens" not in given or len(given) == len(_BOUNDARIES):
            raise UsageError(
                f"the microbatch has {' and '.join(given)}: give cu_seqlens and, where documents "
                "are padded each for itself, one of cu_seqlens_padded and cu_seqlens_unpadded"
            )
        if sample.get("attention_mask") is not None:
            raise UsageError(
                "attention_mask: the documents are packed, and cu_seqlens says what each token "
                "sees, so that a mask would have no effect; leave it out, or do not pack"
            )
        real, padded = _read_boundaries(sample, "cu_seqlens"), None
        if "cu_seqlens_padded" in given:
            padded = _read_boundaries(sample, "cu_seqlens_padded")
        elif "cu_seqlens_unpadded" in given:
            real, padded = _read_boundaries(sample, "cu_seqlens_unpadded"), real
        layout = real if padded is None else padded
        _check_boundaries(layout, sample, shards)
        if padded is not None:
            _check_tokens(real, padded)
        else:
            # Datasets repeat the last boundary so that samples stack; those documents are empty.
            real = layout = torch.unique_consecutive(real)
        longest = int((layout[1:] - layout[:-1]).max())
        return cls(
            cu_seqlens=real,
            cu_seqlens_padded=padded,
            max_seqlen=max(longest, int(sample.get("max_seqlen") or 0)),
        )

    def to_megatron(self, device: Any) -> PackedSeqParams:
        """Return the boundaries in megatron-core's form, on `device`."""
        real, padded = self.cu_seqlens.to(device, non_blocking=True), self.cu_seqlens_padded
        if padded is not None:
            padded = padded.to(device, non_blocking=True)
        # These may be None, which megatron-core's annotations do not say.
        padding: dict[str, Any] = {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=real,
            cu_seqlens_kv=real,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_kv=self.max_seqlen,
            **padding,
        )

    def positions_of_shard(self, rank: int, shards: int) -> torch.Tensor:
        """Return the positions of a context-parallel rank: two chunks of every document.

        Each document is cut into ``2 * shards`` chunks. Rank r takes the chunks r and
        ``2 * shards - 1 - r``, as Transformer Engine's attention over packed sequences expects.
        """
        layout = self.cu_seqlens if self.cu_seqlens_padded is None else self.cu_seqlens_padded
        pieces = []
        for start, end in zip(layout[:-1].tolist(), layout[1:].tolist(), strict=True):
            chunk = (end - start) // (2 * shards)
            for index in (rank, 2 * shards - 1 - rank):
                pieces.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
        return torch.cat(pieces)


def _read_boundaries(sample: Mapping[str, Any], name: str) -> torch.Tensor:
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


def _check_boundaries(layout: torch.Tensor, sample: Mapping[str, Any], shards: int) -> None:
    """Reject boundaries that do not cover the sequence or cannot be cut for context parallelism."""
    lengths = layout[1:] - layout[:-1]
    if len(layout) < 2 or int(layout[0]) != 0 or bool((lengths < 0).any()):
        raise UsageError(
            f"cu_seqlens: {layout.tolist()} must begin with 0 and never fall: it holds the "
            "start of each packed document and the end of the last"
        )
    for name in ("tokens", "position_ids", "labels", "loss_mask"):
        tensor = sample.get(name)
        if tensor is not None and (tensor.shape[0] != 1 or tensor.shape[1] != int(layout[-1])):
            raise UsageError(
                f"cu_seqlens: the packed documents end at {int(layout[-1])}, and {name} has "
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
    """Reject documents whose own tokens are more than their room in the sequence."""
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
