"""Encoding of documents as arrays of token ids."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.gpt.data.tokenization.encoding import encode_text
from bridge.gpt.data.tokenization.special_tokens import SpecialTokens
from bridge.gpt.data.tokenization.tokenizers import ByteTokenizer, Tokenizer


class DocumentEncoder:
    """Encodes documents as arrays of token ids.

    Args:
        tokenizer: The tokenizer.
        dtype: Type of the arrays.
        append_eod: Whether each array ends with the end-of-document token.
    """

    def __init__(
        self, tokenizer: Tokenizer, dtype: type[np.number[Any]], *, append_eod: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._append_eod = append_eod
        self._special = SpecialTokens(tokenizer)
        self.repaired_documents = 0
        """Documents that were not UTF-8, whose wrong bytes became U+FFFD."""
        self.documents_with_special_tokens = 0
        """Documents with special tokens in their text, which are encoded as text."""

    def __call__(self, document: bytes) -> NDArray[Any]:
        """Return the token ids of a document: [tokens]."""
        if isinstance(self._tokenizer, ByteTokenizer):
            ids: NDArray[Any] = np.frombuffer(document, dtype=np.uint8)
        else:
            ids = np.asarray(self._ids(self._decode(document)))
        tokens = np.empty(len(ids) + self._append_eod, dtype=self._dtype)
        tokens[: len(ids)] = ids
        if self._append_eod:
            tokens[-1] = self._tokenizer.eod
        return tokens

    def _ids(self, text: str) -> list[int]:
        if not self._special.are_in(text):
            return self._tokenizer.tokenize(text)
        self.documents_with_special_tokens += 1
        return encode_text(self._tokenizer, text, ends=True)

    def _decode(self, document: bytes) -> str:
        try:
            return document.decode("utf-8")
        except UnicodeDecodeError:
            self.repaired_documents += 1
            return document.decode("utf-8", errors="replace")
