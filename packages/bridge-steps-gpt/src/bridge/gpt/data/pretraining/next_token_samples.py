"""Next-token samples of token files."""

import warnings
from typing import Any, override

import torch

from bridge.gpt.data.pretraining.split_plan import SPLIT_NAMES, SplitPlan
from bridge.training.contracts import SizedDataset
from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import tokens_of_sample

with quiet_import():
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig


class TokenSamples(GPTDataset):
    """megatron-core's samples, in its order, with every token as it is in the files.

    megatron-core finds padding by the tokenizer's pad id. Such a token within a document becomes
    token 0, and the loss mask of the first sample that is served, its padding included, serves all
    later ones too (NVIDIA/Megatron-LM#6981). Here padding is found by its position, after the end
    of the data, where the dataset itself puts it. A pad token within a document is data like any
    other.
    """

    @override
    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """Return tokens, labels, loss mask and position ids of a sample: [sequence] each.

        None asks for a sample that fills up a batch: the first one, with a loss mask of zeros.
        """
        config: Any = self.config  # a GPTDatasetConfig, which the base class does not annotate
        text, lengths = tokens_of_sample(self, 0 if idx is None else idx)
        tokens, labels = torch.from_numpy(text[:-1].copy()), torch.from_numpy(text[1:].copy())
        position_ids = torch.arange(len(tokens))
        ends = tokens == config.tokenizer.eod
        # The last token of the data has no successor. All after it is padding, whose id may be
        # outside the embedding.
        predictions = sum(lengths) - 1
        tokens[predictions + 1 :] = 0
        labels[predictions:] = 0
        loss_mask = (position_ids < (0 if idx is None else predictions)).float()
        if config.eod_mask_loss:
            loss_mask[ends] = 0.0
        if config.reset_position_ids:
            starts = torch.zeros_like(tokens)
            starts[1:] = torch.where(ends[:-1], position_ids[1:], 0)
            position_ids = position_ids - starts.cummax(0).values
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": position_ids,
        }


def build_samples(config: GPTDatasetConfig, plan: SplitPlan, *, split: str) -> SizedDataset:
    """Build the samples of a set; its indices are built in the cache of `config`, or read there.

    Args:
        config: megatron-core's configuration, with the token files of the plan.
        plan: The documents and the number of samples.
        split: "train", "validation" or "test".
    """
    # megatron-core builds all splits at once; sizes and weights differ, so each is built alone.
    index = SPLIT_NAMES.index(split)
    matrix: list[Any] = [None] * len(SPLIT_NAMES)
    matrix[index] = plan.bounds
    config.split_matrix = matrix
    sizes: list[Any] = [0] * len(SPLIT_NAMES)
    sizes[index] = plan.size
    builder = BlendedMegatronDatasetBuilder(TokenSamples, sizes, lambda: True, config)
    with warnings.catch_warnings():
        # The warning is about padding by id, which `TokenSamples` does not use.
        warnings.filterwarnings("ignore", "The pad token id")
        dataset: Any = builder.build()[index]
    samples: SizedDataset = dataset
    return samples
