"""Microbatches of samples, padded or packed, with the images of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from bridge.mimo.data.packing import pack
from bridge.mimo.data.samples import TOKEN_KEYS, find_padding_token, measure_sample
from bridge.mimo.model_config import MultimodalModelConfig
from bridge.mimo.vision import ENCODER
from bridge.training.usage_error import UsageError


def count_items(microbatch: Mapping[str, Any]) -> int:
    """Count the items of a microbatch that `Collate` made, of all modalities."""
    return sum(int(counts.sum()) for counts in microbatch["item_counts"].values())


@dataclass(frozen=True, kw_only=True)
class Collate:
    """A collate function: it makes a microbatch of samples, with their items one after the other.

    The microbatch has the keys that `bridge.training.mimo_step` reads, and ``item_counts``:
    ``{modality: [batch]}``, the number of items of each sample. Its ``modality_inputs`` lack the
    modalities of which it has no item.
    """

    special_token_ids: Mapping[str, int]
    """The token at the positions of each modality's embeddings."""
    tokens_per_item: Mapping[str, int]
    """Number of those tokens for one item."""
    pack: bool = False
    """Whether to put the samples of a microbatch into one row, without their padding (`pack`)."""
    multiple_of: int = 1
    """The length of such a row is a multiple of this."""

    @classmethod
    def for_model(cls, model: MultimodalModelConfig, *, pack: bool = False) -> Self:
        """Return the collate function for a model."""
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
            UsageError: A sample has items of an unknown modality; arguments of one modality with
                different numbers of items, or other arguments than the samples before it; another
                number of special tokens than of embeddings; or tensors of different lengths.
        """
        counts = {
            name: [self._count(sample, name) for sample in samples] for name in self.tokens_per_item
        }
        for index, sample in enumerate(samples):
            self._check(sample, index)
        microbatch: dict[str, Any]
        if self.pack:
            padding = find_padding_token(self.special_token_ids.values())
            microbatch = pack(samples, multiple_of=self.multiple_of, padding=padding)
        else:
            microbatch = {
                key: torch.stack([sample[key] for sample in samples]) for key in TOKEN_KEYS
            }
        microbatch["modality_inputs"] = {
            name: {ENCODER: self._concatenated(samples, name)}
            for name in counts
            if any(counts[name])
        }
        microbatch["item_counts"] = {
            name: torch.tensor(numbers) for name, numbers in counts.items()
        }
        return microbatch

    def _count(self, sample: Mapping[str, Any], name: str) -> int:
        return next((len(value) for value in sample["items"].get(name, {}).values()), 0)

    def _check(self, sample: Mapping[str, Any], index: int) -> None:
        length = measure_sample(sample, index)
        if unknown := sorted(sample["items"].keys() - self.tokens_per_item.keys()):
            raise UsageError(
                f"sample {index} of a microbatch has items of {unknown[0]!r}, and the model has "
                f"encoders of {', '.join(self.tokens_per_item)}; rename the one or add the other"
            )
        for name, each in self.tokens_per_item.items():
            items, token = self._count(sample, name), self.special_token_ids[name]
            sizes = {key: len(value) for key, value in sample["items"].get(name, {}).items()}
            if len(set(sizes.values())) > 1:
                found = ", ".join(f"{size} of {key}" for key, size in sizes.items())
                raise UsageError(
                    f"sample {index} of a microbatch has items of {name!r} with {found}; give each "
                    "argument of the encoder as many"
                )
            # A packed sample loses its padding.
            tokens = sample["input_ids"][: length if self.pack else None]
            number = int((tokens == token).sum())
            if number != items * each:
                raise UsageError(
                    f"sample {index} of a microbatch has {items} items of {name!r}, and {number} "
                    f"tokens {token} for them; give {each} for each item"
                )

    def _concatenated(
        self, samples: Sequence[Mapping[str, Any]], name: str
    ) -> dict[str, torch.Tensor]:
        items = [sample["items"][name] for sample in samples if self._count(sample, name)]
        for of_sample in items:
            if of_sample.keys() != items[0].keys():
                raise UsageError(
                    f"samples of a microbatch have items of {name!r} with other arguments, "
                    f"{', '.join(items[0])} and {', '.join(of_sample)}; give each sample the same"
                )
        return {key: torch.cat([of_sample[key] for of_sample in items]) for key in items[0]}
