"""The lines that `bridge show-batch` prints of a microbatch."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bridge.gpt.data.show_batch import describe_sample, microbatches
from bridge.gpt.data.tokenization.tokenizers import ByteTokenizer
from bridge.training.contracts import DataRequest, DataSplits
from gpt_data import container


def sample(text: bytes, mask: list[int], padding: int = 0) -> dict[str, torch.Tensor]:
    places = len(text) - 1
    ids = torch.tensor([*text, *[256] * padding])
    return {
        "tokens": ids[:-1],
        "labels": ids[1:],
        "loss_mask": torch.tensor([*mask, *[0] * padding]).float(),
        "position_ids": torch.arange(places + padding),
        "padding_mask": torch.arange(places + padding) >= places,
    }


def test_tokens_and_labels_are_shown_in_columns() -> None:
    shown = list(describe_sample(sample("a\nö".encode(), [0, 1, 1], padding=2), 3, ByteTokenizer()))
    assert shown == [
        "sample 3: 3 positions and 2 of padding; 2 count in the loss (66.7 %)",
        "position   id  token   label  predicts  mask",
        "       0   97  'a'        10  '\\n'         0",
        "       1   10  '\\n'      195  <0xC3>       1",
        "       2  195  <0xC3>    182  <0xB6>       1",
    ]


def test_without_a_tokenizer_only_ids_are_shown() -> None:
    lines = list(describe_sample(sample(b"abc", [0, 1]), 1, None))
    assert lines[2].split() == ["0", "97", "98", "0"]


def test_packed_documents_are_separated_and_padding_is_not_shown() -> None:
    packed = sample(b"abcde", [1, 1, 0, 1], padding=2)
    packed["cu_seqlens"] = torch.tensor([0, 2, 4, 6])
    lines = list(describe_sample(packed, 1, ByteTokenizer()))
    assert lines[0].startswith("sample 1: 4 positions in 2 packed documents and 2 of padding; 3")
    assert [index for index, line in enumerate(lines) if not line] == [4]


@dataclass(kw_only=True)
class Pairs:
    """Data of another kind of model."""

    def build(self, request: DataRequest) -> DataSplits:
        data: Any = [(torch.ones(1), torch.ones(1))]
        return DataSplits(train=data)


def test_samples_of_other_models_are_rejected() -> None:
    with pytest.raises(ValueError, match="have no tokens and no labels.*those of GPT recipes"):
        next(microbatches(container(Pairs())))
