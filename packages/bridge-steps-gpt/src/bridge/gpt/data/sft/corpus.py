"""The samples of a split: tokenized once, cut to the model's length, stored as three arrays.

ids.npy     [tokens]       the token ids of all samples, one after the other
counts.npy  [tokens]       whether the token counts in the loss
starts.npy  [samples + 1]  the offset of each sample, and the end of the last one
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bridge.gpt.data.sft.rendering import Rendered
from bridge.training.usage_error import UsageError

_FACTS = "corpus.json"

FORMAT = 2
"""Part of every cache key: raise it when rows are rendered or cut differently."""

type Truncation = Literal["right", "left", "drop"]


@dataclass(kw_only=True)
class CorpusCounts:
    """Numbers of rows and tokens of a split: used, cut and dropped."""

    samples: int = 0
    cut: int = 0
    """Samples that lost tokens."""
    dropped_too_long: int = 0
    """Rows that were longer than a sample, with dataset.truncation=drop."""
    dropped_without_answer: int = 0
    """Rows of which no token was left that counts in the loss."""
    tokens: int = 0
    """Tokens that are predicted, over all samples."""
    counted: int = 0
    """Predicted tokens that count in the loss."""
    with_special_tokens: int = 0
    """Rows with special tokens in their text, which are encoded as text."""
    ignored_keys: dict[str, int] = field(default_factory=dict)
    """Rows with each key of dataset.ignore_keys."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The samples of a split."""

    ids: NDArray[np.int32]
    counts: NDArray[np.bool_]
    starts: NDArray[np.int64]
    report: CorpusCounts
    digest: str
    """Digest of the contents."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the token ids of a sample, and whether each counts in the loss."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[part], self.counts[part]

    def predictions(self) -> NDArray[np.int64]:
        """Return the number of predicted tokens of each sample: all but its first."""
        lengths: NDArray[np.int64] = np.diff(self.starts) - 1
        return lengths


class CorpusWriter:
    """Cuts rendered rows to samples, counts and writes them.

    Args:
        length: Tokens that the model predicts in one sample; a sample holds one more.
        truncation: The cut of a longer row: keep its beginning (right), keep its end (left), or
            drop it (drop).
    """

    def __init__(self, length: int, truncation: Truncation) -> None:
        self._room = length + 1
        self._truncation = truncation
        self._ids: list[NDArray[np.int32]] = []
        self._counts: list[NDArray[np.bool_]] = []
        self.report = CorpusCounts()

    def add(self, row: Rendered) -> None:
        """Add the next row, cut or dropped if it is too long."""
        self.report.with_special_tokens += row.has_special_tokens
        ids, counts = np.array(row.ids, np.int32), np.array(row.counts, np.bool_)
        excess = len(ids) - self._room
        if excess > 0:
            if self._truncation == "drop":
                self.report.dropped_too_long += 1
                return
            kept = slice(excess, None) if self._truncation == "left" else slice(self._room)
            ids, counts = ids[kept], counts[kept]
        # The first token of a sample is not predicted.
        counted = int(counts[1:].sum())
        if counted == 0:
            self.report.dropped_without_answer += 1
            return
        self.report.samples += 1
        self.report.cut += excess > 0
        self.report.tokens += len(ids) - 1
        self.report.counted += counted
        self._ids.append(ids)
        self._counts.append(counts)

    def write(self, directory: Path) -> None:
        """Write all samples to a directory, for `read_corpus`."""
        lengths = [len(ids) for ids in self._ids]
        arrays: dict[str, NDArray[Any]] = {
            "ids": np.concatenate([np.zeros(0, np.int32), *self._ids]),
            "counts": np.concatenate([np.zeros(0, np.bool_), *self._counts]),
            "starts": np.cumsum([0, *lengths], dtype=np.int64),
        }
        digest = hashlib.sha256()
        for name, array in arrays.items():
            np.save(directory / f"{name}.npy", array)
            digest.update(array.tobytes())
        facts = {"digest": digest.hexdigest(), "report": asdict(self.report)}
        # Written last: its presence marks a complete corpus.
        (directory / _FACTS).write_text(json.dumps(facts))


def is_corpus(directory: Path) -> bool:
    """Whether a directory has a complete corpus."""
    return (directory / _FACTS).exists()


def read_corpus(directory: Path) -> Corpus:
    """Open the corpus that `CorpusWriter` wrote; its arrays stay on disk.

    Raises:
        UsageError: This rank does not see the files.
    """
    try:
        facts = json.loads((directory / _FACTS).read_text())
        ids, counts, starts = (
            np.load(directory / f"{name}.npy", mmap_mode="r")
            for name in ("ids", "counts", "starts")
        )
    except OSError as error:
        raise UsageError(
            f"dataset.cache_dir: {directory} cannot be seen from this rank ({error}); on several "
            "nodes it must be on a file system that all of them share"
        ) from error
    return Corpus(
        ids=ids,
        counts=counts,
        starts=starts,
        report=CorpusCounts(**facts["report"]),
        digest=facts["digest"],
    )
