"""GPT data for tests: text, token files, and splits that are built without a real model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge.training.config import ConfigContainer, TokenizerConfig
from bridge.training.contracts import DataRequest, DatasetConfig, DataSplits
from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


@dataclass(kw_only=True)
class ModelOfALength:
    """A model section with nothing but a sequence length, which is all that data needs."""

    seq_length: int | None = 32

    def build(self, *_: Any) -> torch.nn.Module:
        raise NotImplementedError


def container(
    dataset: DatasetConfig,
    *,
    seq_length: int | None = 32,
    tokenizer: TokenizerConfig | None = None,
    seed: int = 1234,
    global_batch_size: int = 1,
) -> ConfigContainer:
    """Return a configuration with this dataset; the tokenizer is of bytes if none is given."""
    config = ConfigContainer(
        model=ModelOfALength(seq_length=seq_length),
        dataset=dataset,
        tokenizer=tokenizer or TokenizerConfig(),
    )
    config.rng.seed = seed
    config.train.global_batch_size = global_batch_size
    return config


def build_splits(
    dataset: DatasetConfig,
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    **settings: Any,
) -> DataSplits:
    """Build the splits of a run that draws these numbers of samples."""
    request = DataRequest(
        config=container(dataset, **settings),
        train_samples=train,
        validation_samples=validation,
        test_samples=test,
    )
    found = dataset.build(request)
    assert isinstance(found, DataSplits)
    return found


def write_story(path: Path, paragraphs: int = 200) -> Path:
    """Write numbered paragraphs, so that any piece of the text shows its position."""
    text = "\n".join(
        f"Paragraph {n} tells of the number {n} and ends.\n" for n in range(paragraphs)
    )
    path.write_text(text)
    return path


def write_pair(prefix: Path, documents: list[list[int]]) -> str:
    """Write documents of token ids to ``prefix.bin`` and ``prefix.idx`` and return the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def read_pair(prefix: str | Path) -> list[list[int]]:
    """Read the token ids of every document of a .bin/.idx pair."""
    dataset: Any = IndexedDataset(str(prefix))
    return [dataset[index].tolist() for index in range(len(dataset))]


def tree(root: Path) -> list[str]:
    """Return every path under a directory, hidden ones included."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
