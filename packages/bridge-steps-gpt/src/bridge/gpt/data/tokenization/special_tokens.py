"""Special tokens that are written in a text: found, counted, and kept apart from real ones.

A user who writes ``<|im_end|>`` means these ten characters. A tokenizer that reads a conversation
as one text takes them for the token that ends a turn (huggingface/transformers#29279).
"""

import re
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from bridge.gpt.data.tokenization.tokenizers import (
    Tokenizer,
    hugging_face_tokenizer,
    special_token_texts,
)
from bridge.training.usage_error import UsageError

type Span = tuple[int, int]
"""First character and the one behind the last."""
type Placed = tuple[int, Span]
"""A token id, and the characters that it stands for."""

_PRIVATE_CHARACTERS = 0xF0000


class SpecialTokens:
    """The special tokens of a tokenizer, as they may be written in a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        texts = sorted(special_token_texts(tokenizer), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)))
        self._has_any = bool(texts)

    def are_in(self, text: str) -> bool:
        """Whether one is written in a text."""
        return self._has_any and self._pattern.search(text) is not None

    def hide(self, texts: Iterable[str]) -> "HiddenTokens":
        """Return the texts with a private character in place of each special token in them."""
        return HiddenTokens(list(texts), self._pattern if self._has_any else None, self._tokenizer)


class HiddenTokens:
    """Texts in which private characters stand for the special tokens that are written there.

    What is made of the texts, such as a conversation by a chat template, is encoded with the
    special tokens that it has beside them, and these as text.
    """

    def __init__(self, texts: list[str], pattern: re.Pattern[str] | None, tokenizer: Any) -> None:
        self._inner = hugging_face_tokenizer(tokenizer)
        self._written: dict[str, str] = {}
        """The text that each private character stands for."""
        self.texts = texts if pattern is None else [self._hidden(t, pattern, texts) for t in texts]

    def __bool__(self) -> bool:
        return bool(self._written)

    def are_in(self, text: str) -> bool:
        """Whether a text has such a character."""
        return not self._written.keys().isdisjoint(text)

    def encode(self, text: str) -> list[Placed]:
        """Encode what was made of the texts.

        Between two special tokens that are none of the texts' own all is one piece of text.

        Raises:
            UsageError: The tokenizer does not tell where in the text a token stands.
        """
        inner: Any = self._inner
        if not inner.is_fast:
            raise UsageError(
                "special tokens are written in the text, and only a fast tokenizer (with a "
                "tokenizer.json) tells them from those of its chat template; set "
                "dataset.chat_template=plain, or take them out"
            )
        encoded = inner(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        placed: list[Placed] = []
        piece: list[Placed] = []
        start = 0
        for index, (first, last) in tokens:
            if not self._is_special(index, text[first:last]):
                piece.append((index, (first, last)))
                continue
            placed += self._piece(text, (start, first), piece)
            placed.append((index, (first, last)))
            piece, start = [], last
        placed += self._piece(text, (start, len(text)), piece)
        return placed

    def _hidden(self, text: str, pattern: re.Pattern[str], texts: list[str]) -> str:
        return pattern.sub(lambda match: self._character_for(match[0], texts), text)

    def _character_for(self, written: str, texts: list[str]) -> str:
        for character, known in self._written.items():
            if known == written:
                return character
        free = (
            character
            for number in count(_PRIVATE_CHARACTERS)
            if (character := chr(number)) not in self._written
            and not any(character in text for text in texts)
        )
        character = next(free)
        self._written[character] = written
        return character

    def _is_special(self, index: int, surface: str) -> bool:
        # An unknown character has the id of a special token too, and another surface.
        token = self._inner.added_tokens_decoder.get(index)  # type: ignore[union-attr]
        return token is not None and token.special and surface.strip() == token.content.strip()

    def _piece(self, text: str, span: Span, tokens: list[Placed]) -> Iterator[Placed]:
        """Yield the tokens of a piece of `text`: those that it has, unless something is hidden."""
        hidden = text[slice(*span)]
        if not self.are_in(hidden):
            yield from tokens
            return
        # The place in `text` of each character that is written.
        places = [
            span[0] + number
            for number, character in enumerate(hidden)
            for _ in self._written.get(character, character)
        ]
        written = "".join(self._written.get(character, character) for character in hidden)
        for index, (first, last) in self._as_text(written, begins=span[0] == 0):
            at = places[min(first, len(places) - 1)]
            yield index, (at, places[last - 1] + 1 if last > first else at)

    def _as_text(self, text: str, *, begins: bool) -> list[Placed]:
        if begins or not self._marks_beginnings():
            return self._text_tokens(text)
        # Where the beginning of a text gets a mark of its own, this one must not be one.
        for lead in ("\n", ".", "a"):
            of_lead, whole = self._text_tokens(lead), self._text_tokens(lead + text)
            rest = whole[len(of_lead) :]
            if whole[: len(of_lead)] == of_lead and all(at[0] >= len(lead) for _, at in rest):
                return [(i, (at[0] - len(lead), at[1] - len(lead))) for i, at in rest]
        return self._text_tokens(text)

    def _text_tokens(self, text: str) -> list[Placed]:
        encoded = self._inner(  # type: ignore[misc]
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        return [
            (index, (first, last))
            for index, (first, last) in zip(
                encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]

    def _marks_beginnings(self) -> bool:
        """Whether a text's first token is another one than behind a special token."""
        inner: Any = self._inner
        end = inner.eos_token
        behind = inner(f"{end}a", add_special_tokens=False).input_ids[1:]
        return bool(behind != inner("a", add_special_tokens=False).input_ids)
