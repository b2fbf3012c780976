"""Encoding of text as token ids: all of a text, a piece of one, and special tokens as text."""

from typing import Any

from bridge.gpt.data.tokenization.tokenizers import Tokenizer
from bridge.training.megatron_patches import library_tokenizer


def hugging_face_tokenizer(tokenizer: Tokenizer) -> Any | None:
    """Return the tokenizer of transformers within megatron-core's, None for other libraries."""
    return _inner_tokenizer(tokenizer, "huggingface")


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that the tokenizer puts before a text, such as a beginning-of-sequence."""
    inner = hugging_face_tokenizer(tokenizer)
    if inner is None:
        return []
    text = "a"
    ids: list[int] = inner(text).input_ids
    return ids[: ids.index(encode_piece(tokenizer, text)[0])]


def encode_piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a piece of a longer text, without tokens for the ends of a text."""
    inner = hugging_face_tokenizer(tokenizer)
    if inner is None:
        return list(tokenizer.tokenize(text))
    ids: list[int] = inner(text, add_special_tokens=False).input_ids
    return ids


def special_token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens that the tokenizer would find in a text, as they are written."""
    inner = hugging_face_tokenizer(tokenizer)
    if inner is not None:
        return [t.content for t in inner.added_tokens_decoder.values() if t.special and t.content]
    tiktoken = _inner_tokenizer(tokenizer, "tiktoken")
    return [] if tiktoken is None else sorted(tiktoken.special_tokens_set)


def encode_text(tokenizer: Tokenizer, text: str, *, ends: bool = False) -> list[int]:
    """Return the ids of a text; special tokens that are written in it are encoded as text.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        ends: Whether to add the tokenizer's own tokens for the ends of a text.
    """
    tiktoken = _inner_tokenizer(tokenizer, "tiktoken")
    if tiktoken is not None:
        return list(tiktoken.encode(text, disallowed_special=()))
    inner = hugging_face_tokenizer(tokenizer)
    if inner is None:
        return list(tokenizer.tokenize(text))
    ids: list[int] = inner(text, add_special_tokens=ends, split_special_tokens=True).input_ids
    return ids


def _inner_tokenizer(tokenizer: Tokenizer, library: str) -> Any | None:
    if getattr(tokenizer, "library", None) != library:
        return None
    return library_tokenizer(tokenizer)
