"""Token files (.bin/.idx): write and read them, and check that they belong to a run.

They are megatron-core's indexed datasets. A build leaves both files or none.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.gpt.data.cache import reject_full_disk
from bridge.gpt.data.text.documents import read_text_documents
from bridge.gpt.data.text.sources import TextFile
from bridge.gpt.data.tokenization.document_encoder import DocumentEncoder
from bridge.gpt.data.tokenization.tokenizers import Tokenizer
from bridge.gpt.name_lists import join_first
from bridge.training.durable_files import (
    abandoned_folders,
    sync_directory,
    sync_tree,
    temporary_folder,
)
from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

logger = logging.getLogger(__name__)

Bounds = tuple[float, float]
"""The first document, and the one after the last, as fractions of all."""
ALL: Bounds = (0.0, 1.0)

_TOKENS = "tokens"
_INDEX_HEADER = b"MMIDIDX\x00\x00"
_TOKENS_PROBED = 2**20


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Contents of token files that were written."""

    documents: int
    tokens: int
    skipped: list[str]
    """Files of directories that are not text, each with its kind."""
    with_special_tokens: int = 0
    """Documents in which special tokens are written; they are encoded as text."""

    def warnings(self) -> list[str]:
        """Return a line for special tokens in the text, and one for files that were skipped."""
        lines = []
        if self.with_special_tokens:
            lines.append(
                f"{self.with_special_tokens} of {self.documents} documents have special tokens "
                "written in their text; they are encoded as text"
            )
        if not self.skipped:
            return lines
        what = "1 file is" if len(self.skipped) == 1 else f"{len(self.skipped)} files are"
        return [*lines, f"{what} not text and skipped: {join_first(self.skipped, 3)}"]


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """One .bin/.idx pair, and the lengths of its documents."""

    prefix: str
    lengths: NDArray[np.int32]
    """Tokens of each document (megatron-core calls them sequences). Shape [documents]."""

    def lengths_within(self, bounds: Bounds) -> NDArray[np.int32]:
        """Return the lengths of the documents within bounds."""
        # megatron-core's rounding, of the same doubles.
        first, last = (int(round(bound * float(len(self.lengths)))) for bound in bounds)
        return self.lengths[first:last]

    def tokens_within(self, bounds: Bounds) -> int:
        """Return the number of tokens of the documents within bounds."""
        return int(self.lengths_within(bounds).sum(dtype=np.int64))


def write_tokens(
    files: Sequence[TextFile],
    tokenizer: Tokenizer,
    prefix: str,
    *,
    json_key: str = "text",
    append_eod: bool = True,
) -> TokenCounts:
    """Write the documents of files to ``prefix.bin`` and ``prefix.idx`` in megatron-core's format.

    Args:
        files: Files of text.
        tokenizer: The tokenizer.
        prefix: The path of the token files, without their suffixes.
        json_key: Key of the text in a line of JSON Lines.
        append_eod: Whether the end-of-document token follows each document.

    Raises:
        UsageError: There is no document, or a file is not text (see `read_text_documents`).
    """
    skipped: list[str] = []
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    encode = DocumentEncoder(tokenizer, dtype, append_eod=append_eod)
    written = tokens = 0
    try:
        for document in read_text_documents(files, json_key=json_key, skipped=skipped):
            # megatron-core annotates a tensor and takes an array.
            ids: Any = encode(document)
            if len(ids) == 0:
                continue
            builder.add_document(ids, [len(ids)])
            written += 1
            tokens += len(ids)
    finally:
        builder.data_file.close()
    if not written:
        why = TokenCounts(documents=0, tokens=0, skipped=skipped).warnings()
        raise UsageError(": ".join(["the files hold no text", *why]) + "; give files of text")
    builder.finalize(f"{prefix}.idx")
    if encode.repaired_documents:
        logger.warning(
            "%d of %d documents were not UTF-8; their wrong bytes were read as U+FFFD",
            encode.repaired_documents,
            written,
        )
    return TokenCounts(
        documents=written,
        tokens=tokens,
        skipped=skipped,
        with_special_tokens=encode.documents_with_special_tokens,
    )


def build_token_files(
    files: Sequence[TextFile],
    tokenizer: Tokenizer,
    prefix: str,
    *,
    json_key: str = "text",
    append_eod: bool = True,
) -> TokenCounts:
    """Tokenize files into a new ``prefix.bin`` and ``prefix.idx``; both appear, or neither.

    Args:
        files: Files of text.
        tokenizer: The tokenizer.
        prefix: The path of the new files, without their suffixes.
        json_key: Key of the text in a line of JSON Lines.
        append_eod: Whether the end-of-document token follows each document.

    Raises:
        UsageError: One of them exists, their directory does not, or there is no text.
    """
    target = Path(os.path.abspath(os.path.expanduser(prefix)))
    halves = [target.with_name(target.name + suffix) for suffix in (".bin", ".idx")]
    _remove_lone_half(*halves)
    existing = [str(half) for half in halves if half.exists()]
    if existing:
        raise UsageError(
            f"--output={prefix!r}: {' and '.join(existing)} exist and are not overwritten; "
            "choose another prefix or remove them"
        )
    if not target.parent.is_dir():
        raise UsageError(f"--output={prefix!r}: create the directory {target.parent} first")
    full_disk = reject_full_disk(f"--output={prefix!r}: {target.parent}", "--output PREFIX")
    with full_disk, temporary_folder(target) as parts:
        counts = write_tokens(
            files, tokenizer, str(parts / _TOKENS), json_key=json_key, append_eod=append_eod
        )
        sync_tree(parts)
        for half in halves:
            # Unlike a rename, a link fails where another process has written in the meantime.
            os.link(parts / f"{_TOKENS}{half.suffix}", half)
        sync_directory(target.parent)
    return counts


def _remove_lone_half(bin_file: Path, idx_file: Path) -> None:
    """Remove the .bin file of a build that was killed before it linked the .idx file."""
    if idx_file.exists() or not bin_file.exists():
        return
    for folder in abandoned_folders(bin_file.parent):
        part = folder / f"{_TOKENS}{bin_file.suffix}"
        if part.exists() and part.samefile(bin_file):
            bin_file.unlink()
            return


def read_token_files(prefix: str, *, name: str | None = None) -> TokenFiles:
    """Read the document lengths of a .bin/.idx pair and check that the two belong together.

    Args:
        prefix: The path of the files, without their suffixes.
        name: The prefix to record, if the files will be moved there.

    Raises:
        UsageError: The files are missing, empty, damaged or of another format.
    """
    check_files(prefix)
    with open(f"{prefix}.idx", "rb") as stream:
        if stream.read(len(_INDEX_HEADER)) != _INDEX_HEADER:
            raise UsageError(
                f"dataset.path: {prefix}.idx is not an index of megatron-core; make one with "
                "'bridge data build'"
            )
    held = os.path.getsize(f"{prefix}.bin")
    if held == 0:
        raise UsageError(f"dataset.path: {prefix}.bin is empty; build it from files with text")
    index = IndexedDataset(prefix).index
    lengths = np.array(index.sequence_lengths)
    files = TokenFiles(prefix=name or prefix, lengths=lengths)
    needed = files.tokens_within(ALL) * index.dtype_size
    if needed > held:
        raise UsageError(
            f"dataset.path: {prefix}.bin has {held} bytes and its index needs {needed}; "
            "the files do not belong together or were cut short, build them again"
        )
    return files


def check_files(prefix: str) -> None:
    """Check that this rank sees the files that rank 0 planned with.

    Raises:
        UsageError: This rank does not see them.
    """
    for suffix in (".bin", ".idx"):
        if not os.path.isfile(prefix + suffix):
            raise UsageError(
                f"dataset.path: {prefix}{suffix} cannot be seen from this rank; on several nodes "
                "data and dataset.cache_dir must be on a file system that all of them share"
            )


def check_vocabulary(prefix: str, vocab_size: int) -> None:
    """Check that the first tokens of a corpus are in the vocabulary.

    Raises:
        UsageError: One is not, so the files were made with another tokenizer.
    """
    dtype: Any = IndexedDataset(prefix).index.dtype
    tokens = np.fromfile(f"{prefix}.bin", dtype=dtype, count=_TOKENS_PROBED)
    largest, smallest = int(tokens.max()), int(tokens.min())
    if largest >= vocab_size or smallest < 0:
        wrong = largest if largest >= vocab_size else smallest
        raise UsageError(
            f"dataset.path: {prefix}.bin holds token {wrong}, and the tokenizer has {vocab_size} "
            "tokens; set tokenizer.type and tokenizer.model to those that made the files"
        )
