"""Samples of token files, independent of each other and of the tokenizer's pad token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.data.pretraining.next_token_samples import TokenSamples
from bridge.training.megatron_import import quiet_import
from gpt_data import build_splits, write_pair
from sft_data import word_tokenizer

with quiet_import():
    from megatron.core.datasets.gpt_dataset import (
        GPTDatasetConfig as MegatronDatasetConfig,
    )
    from megatron.core.datasets.gpt_dataset import (
        _get_ltor_masks_and_position_ids,
    )
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers import MegatronTokenizer

LENGTH, END = 6, 99


def samples_of(tmp_path: Path, documents: list[list[int]], *, pad: int, **settings: Any) -> Any:
    """Return the samples of documents in megatron-core's class for them, for a pad token."""
    prefix = write_pair(tmp_path / "pair", documents)
    options = {"reset_position_ids": False, "eod_mask_loss": False} | settings
    config = MegatronDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"}, vocab_size=END + 1, pad_id=pad
        ),
        reset_attention_mask=False,
        create_attention_mask=False,
        **options,
    )
    corpus = TokenSamples.build_low_level_dataset(prefix, config)
    documents_drawn = np.arange(len(documents), dtype=np.int32)
    return TokenSamples(corpus, prefix, documents_drawn, None, Split.valid, config)


def texts(dataset: Any) -> list[list[int]]:
    """Return the ids of every sample as they are in the files, with the last label."""
    return [dataset._query_document_sample_shuffle_indices(n)[0].tolist() for n in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pad_in", ["the first sample", "a later sample", "none", "every end"])
def test_a_pad_token_of_the_data_is_data_in_every_sample(
    pad_in: str, workers: int, tmp_path: Path
) -> None:
    document = [*range(1, 25), END]
    [first, later, *_] = texts(samples_of(tmp_path / "", [document], pad=-1))
    pad = {"the first sample": first[2], "a later sample": later[2], "none": 50, "every end": END}
    dataset = samples_of(tmp_path / "", [document], pad=pad[pad_in])
    served = [batch for batch in DataLoader(dataset, batch_size=1, num_workers=workers)]
    assert [b["tokens"][0].tolist() for b in served] == [text[:-1] for text in texts(dataset)]
    assert [b["labels"][0].tolist() for b in served] == [text[1:] for text in texts(dataset)]
    assert [b["loss_mask"][0].tolist() for b in served] == [[1.0] * LENGTH] * 4
    assert [b["position_ids"][0].tolist() for b in served] == [[*range(LENGTH)]] * 4


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_masks_and_positions_without_padding_are_those_of_megatron_core(
    reset: bool, mask: bool, tmp_path: Path
) -> None:
    documents = [[n + 1, END] + [n + 1] * (n % 4) + [END] for n in range(12)]
    dataset = samples_of(tmp_path, documents, pad=-1, reset_position_ids=reset, eod_mask_loss=mask)
    assert len(dataset) > 5
    for sample in dataset:
        _, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
            sample["tokens"], END, reset, False, mask, False
        )
        assert torch.equal(sample["loss_mask"], loss_mask)
        assert torch.equal(sample["position_ids"], position_ids)


def test_changing_one_sample_leaves_the_others_unchanged(tmp_path: Path) -> None:
    dataset = samples_of(tmp_path, [[*range(1, 25), END]], pad=3)
    for tensor in dataset[0].values():
        tensor.zero_()
    assert dataset[1]["loss_mask"].tolist() == [1.0] * LENGTH
    assert dataset[0]["position_ids"].tolist() == [*range(LENGTH)]


@pytest.mark.parametrize("pad", [-1, 2, END])
def test_padding_of_the_dataset_does_not_count(pad: int, tmp_path: Path) -> None:
    dataset = samples_of(
        tmp_path,
        [[1, 2, 3, 2, 5, 6, 2, 2, END]],
        pad=pad,
        drop_last_partial_validation_sequence=False,
    )
    whole, rest = sorted(dataset, key=lambda sample: -float(sample["loss_mask"].sum()))
    assert whole["tokens"].tolist() == [1, 2, 3, 2, 5, 6]
    assert whole["loss_mask"].tolist() == [1.0] * 6
    assert rest["tokens"].tolist() == [2, 2, END, 0, 0, 0]
    assert rest["labels"].tolist() == [2, END, 0, 0, 0, 0]
    assert rest["loss_mask"].tolist() == [1.0, 1.0, 0, 0, 0, 0]
    # A sample that only fills up a batch.
    assert dataset[None]["loss_mask"].tolist() == [0.0] * 6


@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize("pad", ["hi", "<eos>"])
def test_a_tokenizer_s_pad_token_within_a_document_is_data(pad: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "lines.jsonl").write_text('{"text": "yes hi no ho hi"}\n' * 20)
    dataset = GPTDatasetConfig(
        path=str(tmp_path / "lines.jsonl"), split="1", cache_dir=str(tmp_path / "cache")
    )
    tokenizer = word_tokenizer(tmp_path / "words", None, pad=pad)
    train: Any = build_splits(dataset, seq_length=8, tokenizer=tokenizer).train
    drawn = [train[index] for index in range(len(train))]
    assert {tuple(sample["loss_mask"].tolist()) for sample in drawn} == {(1.0,) * 8}
    hi_and_ho = [sum(sample["tokens"].tolist().count(t) for sample in drawn) for t in (6, 7)]
    # 112 of 120 tokens fill samples: eighteen lines and "yes hi no ho".
    assert hi_and_ho == [37, 19]
