"""Special tokens that a user wrote in a text, which are encoded as text.

A user who writes ``<|im_end|>`` means these ten characters. A tokenizer that encodes a conversation
as one text takes them for the token that ends a turn (huggingface/transformers#29279).
"""

import re
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from bridge.gpt.data.tokenization.encoding import hugging_face_tokenizer, special_token_texts
from bridge.gpt.data.tokenization.tokenizers import Tokenizer
from bridge.training.usage_error import UsageError

type Span = tuple[int, int]
"""The first character, and the one after the last."""
type TokenSpan = tuple[int, Span]
"""A token id, and its characters in the text."""

_PRIVATE_CHARACTERS = 0xF0000


class SpecialTokens:
    """The special tokens of a tokenizer, as a user may write them in a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        texts = sorted(special_token_texts(tokenizer), key=len, reverse=True)
        # Without special tokens, a pattern that matches nothing.
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def are_in(self, text: str) -> bool:
        """Whether a text has one."""
        return self._pattern.search(text) is not None

    def hide(self, texts: Iterable[str]) -> "HiddenTokens":
        """Return the texts with a private character in place of each special token in them."""
        return HiddenTokens(list(texts), self._pattern, self._tokenizer)


class HiddenTokens:
    """Texts in which a private character is in the place of each special token.

    A chat template may then make one text of them and add special tokens of its own. `encode`
    encodes the template's special tokens as such, and the hidden ones as text.
    """

    def __init__(self, texts: list[str], pattern: re.Pattern[str], tokenizer: Tokenizer) -> None:
        self._inner = hugging_face_tokenizer(tokenizer)
        self._written: dict[str, str] = {}
        """The special token that each private character replaces."""
        self.texts = [
            pattern.sub(lambda match: self._character_for(match[0], texts), text) for text in texts
        ]

    def __bool__(self) -> bool:
        return bool(self._written)

    def are_in(self, text: str) -> bool:
        """Whether a text has one of the private characters."""
        return not self._written.keys().isdisjoint(text)

    def encode(self, text: str) -> list[TokenSpan]:
        """Encode a text that was made of `texts`.

        The text between two special tokens of the template is encoded as one piece.

        Raises:
            UsageError: The tokenizer does not return the characters of each token.
        """
        inner: Any = self._inner
        if not inner.is_fast:
            raise UsageError(
                "special tokens are written in the text, and only a fast tokenizer (with a "
                "tokenizer.json) tells them from those of its chat template; set "
                "dataset.chat_template=plain, or take them out"
            )
        spans: list[TokenSpan] = []
        piece: list[TokenSpan] = []
        start = 0
        for index, (first, last) in self._token_spans(text):
            if not self._is_special(index, text[first:last]):
                piece.append((index, (first, last)))
                continue
            spans += self._piece(text, (start, first), piece)
            spans.append((index, (first, last)))
            piece, start = [], last
        spans += self._piece(text, (start, len(text)), piece)
        return spans

    def _character_for(self, written: str, texts: list[str]) -> str:
        for character, known in self._written.items():
            if known == written:
                return character
        used = self._written.keys() | set().union(*texts)
        character = next(c for c in map(chr, count(_PRIVATE_CHARACTERS)) if c not in used)
        self._written[character] = written
        return character

    def _is_special(self, index: int, surface: str) -> bool:
        # An unknown character has the id of a special token too, but another text.
        token = self._inner.added_tokens_decoder.get(index)  # type: ignore[union-attr]
        return token is not None and token.special and surface.strip() == token.content.strip()

    def _piece(self, text: str, span: Span, tokens: list[TokenSpan]) -> Iterator[TokenSpan]:
        """Yield the tokens of a piece of text, encoded anew if a special token is hidden in it.

        Args:
            text: The full text.
            span: The piece.
            tokens: The tokens of the piece where the full text was encoded at once.
        """
        hidden = text[slice(*span)]
        if not self.are_in(hidden):
            yield from tokens
            return
        # For each character of the written piece, its position in `text`.
        positions = [
            span[0] + number
            for number, character in enumerate(hidden)
            for _ in self._written.get(character, character)
        ]
        written = "".join(self._written.get(character, character) for character in hidden)
        for index, (first, last) in self._as_text(written, begins=span[0] == 0):
            start = positions[min(first, len(positions) - 1)]
            yield index, (start, positions[last - 1] + 1 if last > first else start)

    def _as_text(self, text: str, *, begins: bool) -> list[TokenSpan]:
        if begins or not self._marks_beginnings():
            return self._text_spans(text)
        # This piece is not the beginning of a text, so it must not get the mark of one: encode it
        # after a lead, and remove the lead's tokens.
        for lead in ("\n", ".", "a"):
            lead_tokens, tokens = self._text_spans(lead), self._text_spans(lead + text)
            rest, size = tokens[len(lead_tokens) :], len(lead)
            if tokens[: len(lead_tokens)] == lead_tokens and all(s[0] >= size for _, s in rest):
                return [(index, (first - size, last - size)) for index, (first, last) in rest]
        return self._text_spans(text)

    def _text_spans(self, text: str) -> list[TokenSpan]:
        return self._token_spans(text, split_special_tokens=True)

    def _token_spans(self, text: str, **options: bool) -> list[TokenSpan]:
        inner: Any = self._inner
        encoded = inner(text, add_special_tokens=False, return_offsets_mapping=True, **options)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _marks_beginnings(self) -> bool:
        """Whether a text has other tokens at the beginning than after a special token."""
        inner: Any = self._inner
        end = inner.eos_token
        after_special = inner(f"{end}a", add_special_tokens=False).input_ids[1:]
        return bool(after_special != inner("a", add_special_tokens=False).input_ids)
