"""Samples of text with items of other modalities, and the microbatches that are made of them.

A sample is a dict: ``input_ids``, ``labels``, ``loss_mask`` and ``position_ids``, each [sequence],
and ``items``: ``{modality: {argument: [items, ...]}}``, what the modality's encoder is called with.
A sample without images leaves the modality out, or has 0 items of it. On a rank that reads no items
of a modality they may be empty (`without_content`): their number counts. ``length`` says how many
of its tokens come before its padding; all of them if it is not there.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from bridge.mimo.modules import ENCODER
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.mimo.model_config import MultimodalModelConfig

_TOKENS = ("input_ids", "labels", "loss_mask", "position_ids")


def next_token_sample(
    tokens: Sequence[int],
    *,
    counted: Collection[int],
    seq_length: int,
    padding: int,
    items: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """Make a sample in which some of the tokens are to be predicted from those before them.

    Args:
        tokens: The text, with the special tokens that stand for embeddings.
        counted: Positions in `tokens`, from 1 on, whose predictions count.
        seq_length: Length of the sample; one less than that of the longest text.
        padding: Token that fills it up.
        items: What the special tokens stand for, by modality.

    Raises:
        UsageError: The text is too long, or the first token is to be predicted.
    """
    if not 2 <= len(tokens) <= seq_length + 1:
        raise UsageError(
            f"a sample of {len(tokens)} tokens does not fit model.language.seq_length={seq_length}:"
            f" it takes 2 to {seq_length + 1}"
        )
    if not all(1 <= position < len(tokens) for position in counted):
        raise UsageError(
            f"counted: {sorted(counted)} must be positions from 1 to {len(tokens) - 1}"
        )
    text = torch.tensor(tokens, dtype=torch.int64)
    input_ids = torch.full((seq_length,), padding, dtype=torch.int64)
    input_ids[: len(text) - 1] = text[:-1]
    # A special token need not be in the vocabulary, so it is no label.
    labels = torch.zeros(seq_length, dtype=torch.int64)
    loss_mask = torch.zeros(seq_length)
    targets = torch.tensor(sorted(counted), dtype=torch.int64)
    labels[targets - 1] = text[targets]
    loss_mask[targets - 1] = 1.0
    return {
        "input_ids": input_ids,
        "labels": labels,
        "loss_mask": loss_mask,
        "position_ids": torch.arange(seq_length),
        "length": len(text) - 1,
        "items": dict(items or {}),
    }


def pack(
    samples: Sequence[Mapping[str, Any]], *, multiple_of: int = 1, padding: int = 0
) -> dict[str, Any]:
    """Put samples into one row, without their padding; none of them sees the others.

    Args:
        samples: What `next_token_sample` makes.
        multiple_of: Pad the row to a multiple of this, with a sample that does not count.
        padding: The token of that sample.

    Returns:
        ``input_ids``, ``labels``, ``loss_mask`` and ``position_ids``, each [1, tokens], and
        ``packing_kwargs``, megatron-core's boundaries of the samples.

    Raises:
        UsageError: There is no sample, or the tensors of one do not belong together.
    """
    if not samples or multiple_of < 1:
        raise UsageError(
            f"pack: {len(samples)} samples and multiple_of={multiple_of}; give at least 1 of each"
        )
    lengths = [_length(sample, index) for index, sample in enumerate(samples)]
    missing = -sum(lengths) % multiple_of
    row: dict[str, Any] = {
        key: functional.pad(
            torch.cat(
                [sample[key][:length] for sample, length in zip(samples, lengths, strict=True)]
            ),
            (0, missing),
            value=padding if key == "input_ids" else 0,
        )[None]
        for key in _TOKENS
    }
    if missing:
        lengths.append(missing)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    row["packing_kwargs"] = {
        "cu_seqlens_q": ends,
        "cu_seqlens_kv": ends,
        "max_seqlen_q": max(lengths),
        "max_seqlen_kv": max(lengths),
    }
    return row


def _length(sample: Mapping[str, Any], index: int) -> int:
    """Return how many tokens of a sample come before its padding.

    Raises:
        UsageError: Its tensors have several lengths, or ``length`` is beyond them.
    """
    if missing := [key for key in _TOKENS if key not in sample]:
        raise UsageError(
            f"sample {index} of a microbatch has no {' and no '.join(missing)}; give "
            f"{', '.join(_TOKENS)}"
        )
    shapes = {key: tuple(sample[key].shape) for key in _TOKENS}
    if len(set(shapes.values())) > 1 or len(shapes["input_ids"]) != 1:
        told = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
        raise UsageError(
            f"sample {index} of a microbatch has tensors of the shapes {told}; give all of them "
            "one shape, [sequence]"
        )
    (whole,) = shapes["input_ids"]
    length = int(sample.get("length", whole))
    if not 1 <= length <= whole:
        raise UsageError(
            f"sample {index} of a microbatch: length={length} of {whole} tokens; give the number "
            f"of tokens before the padding, from 1 to {whole}"
        )
    return length


def without_content(number: int) -> dict[str, torch.Tensor]:
    """Return items of a modality that only encoders on other ranks read."""
    return {"nothing": torch.empty(number, 0)}


def number_of_items(microbatch: Mapping[str, Any]) -> int:
    """Count the items of a microbatch that `Collate` made, of all modalities."""
    return sum(int(counts.sum()) for counts in microbatch["item_counts"].values())


@dataclass(frozen=True, kw_only=True)
class Collate:
    """Makes a microbatch of samples: the items of all of them stand one after the other.

    The microbatch is what `bridge.training.mimo_step` reads, and ``item_counts``:
    ``{modality: [batch]}``, how many of the items are each sample's. A modality of which it has no
    item is not in its ``modality_inputs``.
    """

    special_token_ids: Mapping[str, int]
    """The token that stands for an embedding of each modality."""
    tokens_per_item: Mapping[str, int]
    """How many of them stand for an item."""
    pack: bool = False
    """Put the samples of a microbatch into one row, without their padding (`pack`)."""
    multiple_of: int = 1
    """The length of such a row."""

    @classmethod
    def of(cls, model: "MultimodalModelConfig", *, pack: bool = False) -> "Collate":
        """Return what makes microbatches for a model."""
        language = model.language
        return cls(
            pack=pack,
            multiple_of=language.tensor_model_parallel_size if language.sequence_parallel else 1,
            special_token_ids=dict(model.special_token_ids),
            tokens_per_item={
                name: encoder.tokens_per_image for name, encoder in model.encoders.items()
            },
        )

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a microbatch.

        Raises:
            UsageError: A sample has items of an unknown modality, arguments of one with other
                numbers of items or by other names than the samples before it, another number of
                special tokens than its items are embeddings, or tensors that do not belong
                together.
        """
        counts = {name: [self._count(sample, name) for sample in samples] for name in self._names()}
        for index, sample in enumerate(samples):
            self._check(sample, index)
        microbatch: dict[str, Any]
        if self.pack:
            special = self.special_token_ids.values()
            plain = next(token for token in range(len(special) + 1) if token not in special)
            microbatch = pack(samples, multiple_of=self.multiple_of, padding=plain)
        else:
            microbatch = {key: torch.stack([sample[key] for sample in samples]) for key in _TOKENS}
        microbatch["modality_inputs"] = {
            name: {ENCODER: self._together(samples, name)} for name in counts if any(counts[name])
        }
        microbatch["item_counts"] = {name: torch.tensor(of) for name, of in counts.items()}
        return microbatch

    def _names(self) -> list[str]:
        return list(self.tokens_per_item)

    def _count(self, sample: Mapping[str, Any], name: str) -> int:
        return next((len(value) for value in sample["items"].get(name, {}).values()), 0)

    def _check(self, sample: Mapping[str, Any], index: int) -> None:
        length = _length(sample, index)
        if unknown := sorted(sample["items"].keys() - self.tokens_per_item.keys()):
            raise UsageError(
                f"sample {index} of a microbatch has items of {unknown[0]!r}, and the model has "
                f"encoders of {', '.join(self._names())}; rename the one or add the other"
            )
        for name, each in self.tokens_per_item.items():
            items, token = self._count(sample, name), self.special_token_ids[name]
            numbers = {key: len(value) for key, value in sample["items"].get(name, {}).items()}
            if len(set(numbers.values())) > 1:
                told = ", ".join(f"{number} of {key}" for key, number in numbers.items())
                raise UsageError(
                    f"sample {index} of a microbatch has items of {name!r} with {told}; give each "
                    "argument of the encoder as many"
                )
            # A packed sample loses what lies in its padding.
            tokens = sample["input_ids"][: length if self.pack else None]
            places = int((tokens == token).sum())
            if places != items * each:
                raise UsageError(
                    f"sample {index} of a microbatch has {items} items of {name!r}, and {places} "
                    f"tokens {token} for them; give {each} for each item"
                )

    def _together(self, samples: Sequence[Mapping[str, Any]], name: str) -> dict[str, torch.Tensor]:
        items = [sample["items"][name] for sample in samples if self._count(sample, name)]
        for of_sample in items:
            if of_sample.keys() != items[0].keys():
                raise UsageError(
                    f"samples of a microbatch have items of {name!r} with other arguments, "
                    f"{', '.join(items[0])} and {', '.join(of_sample)}; give each sample the same"
                )
        return {key: torch.cat([of_sample[key] for of_sample in items]) for key in items[0]}
