"""Documents to arrays of token ids."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.gpt.data.tokenization.special_tokens import SpecialTokens
from bridge.gpt.data.tokenization.tokenizers import ByteTokenizer, Tokenizer, text_ids


class DocumentEncoder:
    """Turns documents into arrays of token ids, each ended by the end-of-document token."""

    def __init__(
        self, tokenizer: Tokenizer, dtype: type[np.number[Any]], *, append_eod: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.append_eod = append_eod
        self._special = SpecialTokens(tokenizer)
        self.repaired_documents = 0
        """Documents that were not UTF-8: their wrong bytes became U+FFFD."""
        self.documents_with_special_tokens = 0
        """Documents in which special tokens are written, which are encoded as text."""

    def __call__(self, document: bytes) -> NDArray[Any]:
        """Encode one document: 1-D, of the dtype given."""
        if isinstance(self.tokenizer, ByteTokenizer):
            ids: NDArray[Any] = np.frombuffer(document, dtype=np.uint8)
        else:
            ids = np.asarray(self._ids(self._decode(document)))
        tokens = np.empty(len(ids) + self.append_eod, dtype=self.dtype)
        tokens[: len(ids)] = ids
        if self.append_eod:
            tokens[-1] = self.tokenizer.eod
        return tokens

    def _ids(self, text: str) -> list[int]:
        if not self._special.are_in(text):
            return self.tokenizer.tokenize(text)
        self.documents_with_special_tokens += 1
        return text_ids(self.tokenizer, text, ends=True)

    def _decode(self, document: bytes) -> str:
        try:
            return document.decode("utf-8")
        except UnicodeDecodeError:
            self.repaired_documents += 1
            return document.decode("utf-8", errors="replace")
