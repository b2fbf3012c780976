"""Rendering of a conversation: its token ids, and whether each counts in the loss.

The text is cut where an answer begins and ends, and each piece is tokenized by itself. So the mask
is exact, and an answer's tokens are those that the model generates after the tokens of its prompt.
Special tokens that are written in a turn are encoded as text.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from bridge.gpt.data.sft.rows.conversations import ASSISTANT, Conversation
from bridge.gpt.data.tokenization.encoding import (
    encode_piece,
    encode_text,
    hugging_face_tokenizer,
    leading_tokens,
)
from bridge.gpt.data.tokenization.special_tokens import HiddenTokens, SpecialTokens
from bridge.gpt.data.tokenization.tokenizers import Tokenizer
from bridge.training.usage_error import UsageError

type LossOn = Literal["assistant", "answer", "all"]

# Chat templates mark what the assistant says with {% generation %} (transformers, "Chat
# templates").
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The tokens of a conversation."""

    ids: list[int]
    counts: list[bool]
    """Whether the token counts in the loss, as the one to be predicted."""
    has_special_tokens: bool = False
    """Whether special tokens are written in a turn."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A part of a conversation; either all of it counts in the loss, or nothing."""

    text: str = ""
    counts: bool = False
    ends: bool = False
    """Whether the end-of-document token follows the text."""
    is_turn: bool = False
    """Whether all of it is the text of a turn, and none of it is the template's."""


class Renderer:
    """Turns conversations into tokens.

    Args:
        tokenizer: The tokenizer.
        template: "plain" for a prompt and its completion unchanged, and for chats with a line
            ``<|role|>`` before each turn; "tokenizer" for the chat template of a Hugging Face
            tokenizer, in which a prompt is a turn of the user.
        loss_on: The tokens that count: every turn of the assistant, its last one, or all.

    Raises:
        UsageError: The tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, template: Literal["plain", "tokenizer"], loss_on: LossOn
    ) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._special = SpecialTokens(tokenizer)
        self._template: Any = None
        if template == "tokenizer":
            self._template = hugging_face_tokenizer(tokenizer)
            if self._template is None or not self._template.chat_template:
                raise UsageError(
                    "dataset.chat_template=tokenizer: the tokenizer has no chat template; set "
                    "dataset.chat_template=plain, or take a tokenizer whose files have one"
                )

    def __call__(self, conversation: Conversation) -> Rendered:
        """Render a conversation.

        Raises:
            UsageError: Nothing in it would count, or the chat template cannot be used for it.
        """
        answers = [n for n, turn in enumerate(conversation.turns) if turn.role == ASSISTANT]
        if not answers and self._loss_on != "all":
            raise UsageError(
                f"{conversation.place}: no turn is the assistant's, so nothing counts with "
                f"dataset.loss_on={self._loss_on}; remove the row, or set dataset.loss_on=all"
            )
        counted = set(answers if self._loss_on == "assistant" else answers[-1:])
        if self._template is None:
            rendered = self._join(self._plain_pieces(conversation, counted), start=True)
        else:
            rendered = self._render_by_template(conversation, counted)
        everything = [True] * len(rendered.ids)
        return Rendered(
            ids=rendered.ids,
            counts=everything if self._loss_on == "all" else rendered.counts,
            has_special_tokens=any(self._special.are_in(turn.text) for turn in conversation.turns),
        )

    def _plain_pieces(self, conversation: Conversation, counted: set[int]) -> Iterator[_Piece]:
        for number, turn in enumerate(conversation.turns):
            is_answer = turn.role == ASSISTANT
            if conversation.is_chat:
                yield _Piece(text=f"<|{turn.role}|>\n")
            text = turn.text if is_answer or not conversation.is_chat else f"{turn.text}\n"
            yield _Piece(text=text, counts=number in counted, ends=is_answer, is_turn=True)

    def _render_by_template(self, conversation: Conversation, counted: set[int]) -> Rendered:
        hidden = self._special.hide(turn.text for turn in conversation.turns)
        messages = [
            {"role": turn.role, "content": text}
            for turn, text in zip(conversation.turns, hidden.texts, strict=True)
        ]
        try:
            if self._loss_on == "all":
                return self._join([_Piece(text=self._text(messages))], hidden)
            if _GENERATION.search(self._template.chat_template):
                return self._render_marked(messages, hidden)
            return self._join(self._answer_pieces(messages, sorted(counted)), hidden)
        except UsageError as error:
            raise UsageError(f"{conversation.place}: {error}") from error

    def _text(self, messages: list[dict[str, str]], *, with_generation_prompt: bool = False) -> str:
        with _errors_of_template():
            text: str = self._template.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=with_generation_prompt
            )
        return text

    def _render_marked(self, messages: list[dict[str, str]], hidden: HiddenTokens) -> Rendered:
        """Render with the tokens counting that the template marks as the assistant's."""
        ids, counts = self._read_marks(messages, hidden)
        if self._loss_on == "answer":
            last = len(counts)
            while last and not counts[last - 1]:
                last -= 1
            first = last
            while first and counts[first - 1]:
                first -= 1
            counts = [first <= n < last for n in range(len(counts))]
        return Rendered(ids=ids, counts=counts)

    def _read_marks(
        self, messages: list[dict[str, str]], hidden: HiddenTokens
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and whether the template marks each."""
        if not hidden:
            with _errors_of_template():
                encoded = self._template.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
            return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
        from transformers.utils.chat_template_utils import render_jinja_template

        with _errors_of_template():
            # It returns a list of texts and, with this option, the marked spans of each.
            result: Any = render_jinja_template(
                [messages],
                chat_template=self._template.chat_template,
                return_assistant_tokens_mask=True,
                **self._template.special_tokens_map,
            )
            [text], [spans] = result
        tokens = hidden.encode(text)
        marks = [
            any(first < end and last > begin for begin, end in spans) for _, (first, last) in tokens
        ]
        return [index for index, _ in tokens], marks

    def _answer_pieces(
        self, messages: list[dict[str, str]], counted: list[int]
    ) -> Iterator[_Piece]:
        """Yield the pieces of the conversation's text: each answer, and the text between answers.

        The text before an answer is that of the turns before it, with the template's generation
        prompt. It must be the beginning of the text up to the answer's end, and that the beginning
        of the full text.
        """
        full, done = self._text(messages), 0
        for number in counted:
            before = self._text(messages[:number], with_generation_prompt=True)
            after = self._text(messages[: number + 1])
            if not (full.startswith(after) and after.startswith(before) and done <= len(before)):
                raise UsageError(
                    f"the tokenizer's chat template writes the conversation up to turn {number} "
                    "otherwise than as the beginning of the whole, so its tokens cannot be "
                    "separated; set dataset.loss_on=answer or all, or dataset.chat_template=plain, "
                    "or mark the assistant's text with {% generation %} in the template"
                )
            yield _Piece(text=full[done : len(before)])
            yield _Piece(text=full[len(before) : len(after)], counts=True)
            done = len(after)
        yield _Piece(text=full[done:])

    def _join(
        self,
        pieces: Iterator[_Piece] | list[_Piece],
        hidden: HiddenTokens | None = None,
        *,
        start: bool = False,
    ) -> Rendered:
        ids = leading_tokens(self._tokenizer) if start else []
        counts = [False] * len(ids)
        for piece in pieces:
            added = self._ids(piece, hidden) if piece.text else []
            added += [self._tokenizer.eod] * piece.ends
            ids += added
            counts += [piece.counts] * len(added)
        return Rendered(ids=ids, counts=counts)

    def _ids(self, piece: _Piece, hidden: HiddenTokens | None) -> list[int]:
        if piece.is_turn and self._special.are_in(piece.text):
            return encode_text(self._tokenizer, piece.text)
        if hidden is not None and hidden.are_in(piece.text):
            return [index for index, _ in hidden.encode(piece.text)]
        return encode_piece(self._tokenizer, piece.text)


@contextmanager
def _errors_of_template() -> Iterator[None]:
    """Report any error of a template as the user's: jinja's, missing keys, or its own."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"the tokenizer's chat template rejects it ({error}); fix the row, or set "
            "dataset.chat_template=plain"
        ) from error
