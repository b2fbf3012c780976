"""Tokenize documents into .bin/.idx files, once, and never leave half of one behind."""

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed

from bridge.gpt.data.documents import TextFile, read_documents
from bridge.gpt.data.encoder import Encoder
from bridge.gpt.data.tokenizers import Tokenizer, build_tokenizer, identity
from bridge.training.config import TokenizerConfig
from bridge.training.durable_files import (
    abandoned_folders,
    make_directory,
    publish_folder,
    sync_directory,
    sync_tree,
    temporary_folder,
)
from bridge.training.megatron_import import quiet_import
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Part of every cache key: raise it when documents are cut or encoded differently."""
_TOKENS = "tokens"


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """The files that were written, and remarks about them."""

    documents: int
    tokens: int
    skipped: list[str]
    """Files of directories that are not text, each with what it is."""
    with_special_tokens: int = 0
    """Documents in which special tokens are written; they are encoded as text."""

    def warnings(self) -> list[str]:
        """Return a line for each thing that a user should know of."""
        lines = []
        if self.with_special_tokens:
            lines.append(
                f"{self.with_special_tokens} of {self.documents} documents have special tokens "
                "written in their text; they are encoded as text"
            )
        if not self.skipped:
            return lines
        shown, more = self.skipped[:3], len(self.skipped) - 3
        what = "1 file is" if len(self.skipped) == 1 else f"{len(self.skipped)} files are"
        listed = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
        return [*lines, f"{what} not text and skipped: {listed}"]


@dataclass(frozen=True, kw_only=True)
class CachedTokens:
    """Token files in the cache."""

    prefix: str
    """Where they are once the block that made them has ended."""
    readable_prefix: str
    """Where they are inside that block."""
    counts: TokenCounts
    """Their contents."""


def default_cache_dir() -> Path:
    """``bridge/data`` under XDG_CACHE_HOME, or under ~/.cache where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "bridge" / "data"


def cache_directory(given: str | None) -> Path:
    """Where tokens and indices are kept: the user's ``dataset.cache_dir``, or the default."""
    if given is None:
        return default_cache_dir()
    return Path(os.path.abspath(os.path.expanduser(given)))


def write_tokens(
    documents: Iterable[bytes],
    tokenizer: Tokenizer,
    prefix: str,
    *,
    append_eod: bool = True,
    skipped: Sequence[str] = (),
) -> TokenCounts:
    """Write documents to ``prefix.bin`` and ``prefix.idx`` in megatron-core's format.

    Args:
        documents: Texts in UTF-8.
        tokenizer: Makes ids of them.
        prefix: The files, without their suffixes.
        append_eod: Whether the end-of-document token follows each document.
        skipped: The files that `documents` leaves out, once it has been read.

    Raises:
        UsageError: There is no document.
    """
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    encode = Encoder(tokenizer, dtype, append_eod=append_eod)
    written = tokens = 0
    try:
        for document in documents:
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
        why = TokenCounts(documents=0, tokens=0, skipped=list(skipped)).warnings()
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
        skipped=list(skipped),
        with_special_tokens=encode.documents_with_special_tokens,
    )


def build_index(
    files: Sequence[TextFile],
    tokenizer: Tokenizer,
    prefix: str,
    *,
    json_key: str = "text",
    append_eod: bool = True,
) -> TokenCounts:
    """Tokenize files into a new ``prefix.bin`` and ``prefix.idx``; both appear, or neither.

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
    full_disk = _refusing_full_disk(f"--output={prefix!r}: {target.parent}", "--output PREFIX")
    with full_disk, temporary_folder(target) as parts:
        skipped: list[str] = []
        counts = write_tokens(
            read_documents(files, json_key=json_key, skipped=skipped),
            tokenizer,
            str(parts / _TOKENS),
            append_eod=append_eod,
            skipped=skipped,
        )
        sync_tree(parts)
        for half in halves:
            # Unlike a rename, a link fails where another process has written in the meantime.
            os.link(parts / f"{_TOKENS}{half.suffix}", half)
        sync_directory(target.parent)
    return counts


@contextmanager
def cached_tokens(
    files: Sequence[TextFile],
    tokenizer_config: TokenizerConfig,
    cache_dir: Path,
    *,
    json_key: str = "text",
) -> Iterator[CachedTokens]:
    """Tokenize files into the cache, unless the same is there already.

    The same are: the files' names, sizes and times of change, the tokenizer and its files. What
    was written enters the cache when the block ends; if the block raises, it is thrown away.

    Raises:
        UsageError: There is no text, or the cache cannot be written.
    """
    key = digest(
        {
            "format": _FORMAT,
            "files": [[str(f.path), f.size, f.modified_ns, f.chosen] for f in files],
            "tokenizer": identity(tokenizer_config),
            "json_key": json_key,
        }
    )
    final = cache_dir / "tokens" / key
    with published(final) as directory:
        readable = directory / _TOKENS
        if not readable.with_suffix(".idx").exists():
            _tokenize_into(readable, files, tokenizer_config, json_key)
        yield CachedTokens(
            prefix=str(final / _TOKENS),
            readable_prefix=str(readable),
            counts=TokenCounts(**json.loads(readable.with_suffix(".json").read_text())),
        )


def _tokenize_into(
    prefix: Path, files: Sequence[TextFile], tokenizer_config: TokenizerConfig, json_key: str
) -> None:
    size = sum(file.size for file in files)
    logger.info("tokenizing %d files, %.1f MB", len(files), size / 1e6)
    start = time.monotonic()
    tokenizer = build_tokenizer(tokenizer_config)
    skipped: list[str] = []
    documents = read_documents(files, json_key=json_key, skipped=skipped)
    counts = write_tokens(documents, tokenizer, str(prefix), skipped=skipped)
    prefix.with_suffix(".json").write_text(json.dumps(asdict(counts)))
    logger.info(
        "tokenized %d documents into %d tokens in %.1f s",
        counts.documents,
        counts.tokens,
        time.monotonic() - start,
    )


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """Yield a directory to fill, which becomes `final` if the block ends without an exception.

    Where `final` exists it is yielded as it is. Processes may do this at the same time: each
    fills a directory of its own and the first one to end wins.

    Raises:
        UsageError: The cache cannot be written.
    """
    if final.is_dir():
        yield final
        return
    full_disk = _refusing_full_disk(f"dataset.cache_dir: {final.parent}", "dataset.cache_dir=DIR")
    with full_disk, ExitStack() as stack:
        try:
            make_directory(final.parent)
            directory = stack.enter_context(temporary_folder(final))
        except OSError as error:
            raise UsageError(
                f"dataset.cache_dir: {final.parent} cannot be written ({error}); "
                "name a directory that can with dataset.cache_dir=DIR"
            ) from error
        yield directory
        try:
            publish_folder(directory, final)
        except OSError:
            if not final.is_dir():
                raise


@contextmanager
def _refusing_full_disk(place: str, option: str) -> Iterator[None]:
    """Write tokens in this block.

    Raises:
        UsageError: In place of an OSError that says that nothing more can be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UsageError(
            f"{place} cannot be written ({error.strerror}); make room, or name another directory "
            f"with {option}"
        ) from error


def _remove_lone_half(bin_file: Path, idx_file: Path) -> None:
    """Remove the half that a build has linked which was killed before it linked the other."""
    if idx_file.exists() or not bin_file.exists():
        return
    for folder in abandoned_folders(bin_file.parent):
        part = folder / f"{_TOKENS}{bin_file.suffix}"
        if part.exists() and part.samefile(bin_file):
            bin_file.unlink()
            return


def digest(description: Any) -> str:
    """A short name for anything that JSON can hold."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextmanager
def published_by_first_rank(final: Path) -> Iterator[Path]:
    """`published` for a directory that rank 0 fills while the other ranks read it."""
    with ExitStack() as stack:
        yield on_first_rank(lambda: stack.enter_context(published(final)))
        if torch.distributed.is_initialized():
            # The others still open files by the name that ends with this block.
            torch.distributed.barrier()
