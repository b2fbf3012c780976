"""Corpora of a set of samples: token files that exist, or that are made from its text.

Text is tokenized once: the token files of the same text and tokenizer are kept in the cache.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bridge.gpt.data.cache import digest, published
from bridge.gpt.data.text.sources import Source, TextFile
from bridge.gpt.data.token_files import (
    TokenCounts,
    TokenFiles,
    check_vocabulary,
    read_token_files,
    write_tokens,
)
from bridge.gpt.data.tokenization.tokenizers import (
    build_tokenizer,
    tokenizer_identity,
    tokenizer_vocab_size,
)
from bridge.training.config import TokenizerConfig
from bridge.training.usage_error import UsageError

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Part of every cache key: raise it when documents are cut or encoded differently."""
_TOKENS = "tokens"

type _Part = str | tuple[TextFile, ...]
"""The prefix of token files, or files of text."""


@dataclass(frozen=True, kw_only=True)
class CachedTokens:
    """Token files that enter the cache."""

    prefix: str
    """Their path after the block of `cached_tokens`."""
    readable_prefix: str
    """Their path inside that block."""
    counts: TokenCounts


def open_corpora(
    sources: Sequence[Source],
    *,
    has_weights: bool,
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    json_key: str,
    stack: ExitStack,
) -> tuple[list[TokenFiles], list[str]]:
    """Open the corpora of a set; text is tokenized unless it is in the cache.

    Args:
        sources: The files of each entry of the user's path.
        has_weights: Whether each entry has a weight, and then has to be one corpus. Without
            weights all text is one corpus, and each pair of token files is one.
        tokenizer: The tokenizer of the run.
        cache_dir: The folder of the cache.
        json_key: Key of the text in a line of JSON Lines.
        stack: Text that is tokenized now enters the cache when this stack is closed.

    Returns:
        The corpora, and warnings for the user.

    Raises:
        UsageError: Data is missing, empty, damaged, or of another tokenizer.
    """
    warning_lines = [line for source in sources for line in source.not_read]
    vocabulary = tokenizer_vocab_size(tokenizer)
    corpora = []
    for part in _one_for_each(sources) if has_weights else _all_text_as_one(sources):
        if isinstance(part, str):
            corpora.append(read_token_files(part))
            check_vocabulary(part, vocabulary)
            continue
        if tokenizer.type == "null":
            raise UsageError(
                "tokenizer.type=null is for mock data and token files, not for text; set "
                "tokenizer.type=bytes"
            )
        cached = stack.enter_context(cached_tokens(part, tokenizer, cache_dir, json_key=json_key))
        warning_lines += cached.counts.warnings()
        corpora.append(read_token_files(cached.readable_prefix, name=cached.prefix))
    return corpora, warning_lines


def _all_text_as_one(sources: Sequence[Source]) -> list[_Part]:
    prefixes: list[_Part] = [prefix for source in sources for prefix in source.prefixes]
    text = tuple(file for source in sources for file in source.files)
    return [*prefixes, text] if text else prefixes


def _one_for_each(sources: Sequence[Source]) -> list[_Part]:
    order: list[_Part] = []
    for source in sources:
        parts: list[_Part] = [*source.prefixes, *([source.files] if source.files else [])]
        if len(parts) != 1:
            raise UsageError(
                f"dataset.weights: {source.entry!r} has {len(parts)} corpora and "
                "has one weight; list them one by one"
            )
        order += parts
    return order


@contextmanager
def cached_tokens(
    files: Sequence[TextFile],
    tokenizer_config: TokenizerConfig,
    cache_dir: Path,
    *,
    json_key: str = "text",
) -> Iterator[CachedTokens]:
    """Tokenize files into the cache, unless it has the tokens already.

    The key is made of the files' names, sizes and times of change, and of the tokenizer and its
    files. New tokens enter the cache when the block ends. If the block raises, they are removed.

    Raises:
        UsageError: There is no text, or the cache cannot be written.
    """
    key = digest(
        {
            "format": _FORMAT,
            "files": [[str(f.path), f.size, f.modified_ns, f.is_chosen] for f in files],
            "tokenizer": tokenizer_identity(tokenizer_config),
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
    counts = write_tokens(files, tokenizer, str(prefix), json_key=json_key)
    prefix.with_suffix(".json").write_text(json.dumps(asdict(counts)))
    logger.info(
        "tokenized %d documents into %d tokens in %.1f s",
        counts.documents,
        counts.tokens,
        time.monotonic() - start,
    )
