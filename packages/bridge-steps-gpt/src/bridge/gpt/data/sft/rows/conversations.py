"""Conversations: one is read from each row.

A row is a JSON object, or a row of a Hugging Face dataset, in one of three forms:

    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

Other keys are rejected, unless dataset.ignore_keys names them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.gpt.data.sft.rows.extra_keys import Holder, extra_keys_in
from bridge.training.spelling import did_you_mean
from bridge.training.usage_error import UsageError

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
"""The roles of a chat."""

_SHAREGPT_KEY = "conversations"
_SHAREGPT_ROLES = {"human": "user", "gpt": ASSISTANT}
# The keys of a turn's role and of its text.
_OF_CHAT = ("role", "content")
_OF_SHAREGPT = ("from", "value")
_PREFERENCE_KEYS = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A turn of a conversation."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The conversation in a row."""

    place: str
    """The file and line of the row, for messages."""
    turns: tuple[Turn, ...]
    is_chat: bool
    """False for a prompt and its completion, which are the two turns."""


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """The keys of a row."""

    prompt: str
    completion: str
    messages: str
    ignored: tuple[str, ...] = ()
    """Keys of rows and turns that the user ignores (dataset.ignore_keys)."""


def extra_keys_of(record: Mapping[str, Any], keys: RowKeys) -> Iterator[tuple[str, Holder]]:
    """Yield the keys of a row and of its turns that `read_conversation` does not read."""
    chat = _find_chat(record, keys)
    if chat is None:
        # A row without these two is malformed, and its error names all of its keys.
        if all(key in record for key in (keys.prompt, keys.completion)):
            for key in extra_keys_in(record, {keys.prompt, keys.completion}):
                yield key, "rows"
        return
    chat_key, turn_keys = chat
    for key in extra_keys_in(record, {chat_key}):
        yield key, "rows"
    turns = record[chat_key]
    for turn in turns if isinstance(turns, Sequence) else ():
        # A turn without a role is malformed.
        if isinstance(turn, Mapping) and turn.get(turn_keys[0]) is not None:
            for key in extra_keys_in(turn, turn_keys):
                yield key, "turns"


def read_conversation(record: Mapping[str, Any], place: str, keys: RowKeys) -> Conversation:
    """Read the conversation of a row.

    Raises:
        UsageError: It is malformed; the message has its place and the reason.
    """
    chat = _find_chat(record, keys)
    if chat is not None:
        chat_key, turn_keys = chat
        turns = _read_turns(record[chat_key], f"{place}: {chat_key}", turn_keys, keys)
        return Conversation(place=place, turns=turns, is_chat=True)
    missing = [key for key in (keys.prompt, keys.completion) if key not in record]
    if missing and all(key in record for key in _PREFERENCE_KEYS):
        raise UsageError(
            f"{place}: 'chosen' and 'rejected' make a preference row, for training by comparison "
            f"(DPO), which is not supported; to train on what was chosen, write it as "
            f"{keys.completion!r}"
        )
    if missing:
        raise UsageError(
            f"{place}: no {' and no '.join(map(repr, missing))} (there is "
            f"{', '.join(map(repr, record)) or 'nothing'}"
            f"{did_you_mean(missing[0], record)}); a row has {keys.prompt!r} and "
            f"{keys.completion!r}, or {keys.messages!r}; name other keys with "
            "dataset.prompt_key, dataset.completion_key and dataset.messages_key"
        )
    texts = [_read_text(record[key], f"{place}: {key}") for key in (keys.prompt, keys.completion)]
    turns = (Turn(role="user", text=texts[0]), Turn(role=ASSISTANT, text=texts[1]))
    return Conversation(place=place, turns=turns, is_chat=False)


def _find_chat(record: Mapping[str, Any], keys: RowKeys) -> tuple[str, tuple[str, str]] | None:
    """Return the key of a row's chat, and the keys of role and text in its turns; None without."""
    for chat_key, turn_keys in ((keys.messages, _OF_CHAT), (_SHAREGPT_KEY, _OF_SHAREGPT)):
        if record.get(chat_key) is not None:
            return chat_key, turn_keys
    return None


def _read_turns(
    messages: Any, place: str, turn_keys: tuple[str, str], keys: RowKeys
) -> tuple[Turn, ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError(
            f"{place}: expected a list of messages, got {short_repr(messages)}; write one, as "
            f'[{{"{turn_keys[0]}": ..., "{turn_keys[1]}": ...}}], or take the row out'
        )
    return tuple(
        _read_turn(message, f"{place}[{number}]", turn_keys, keys)
        for number, message in enumerate(messages)
    )


def _read_turn(message: Any, place: str, turn_keys: tuple[str, str], keys: RowKeys) -> Turn:
    role_key, text_key = turn_keys
    if not isinstance(message, Mapping) or message.get(role_key) is None:
        raise UsageError(
            f"{place}: expected an object with {role_key!r} and {text_key!r}, got "
            f"{short_repr(message)}; {_advice_for_turn(message, turn_keys)}"
        )
    role = message[role_key]
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise UsageError(
            f"{place}: the role {role!r} is none of {', '.join((*ROLES, *_SHAREGPT_ROLES))}"
            f"{did_you_mean(str(role), ROLES)}; write one of these, or take the row out"
        )
    text = message.get(text_key)
    if text is None and extra_keys_in(message, {*turn_keys, *keys.ignored}):
        text = ""  # its other keys are the mistake, and are reported
    return Turn(role=role, text=_read_text(text, f"{place}: {text_key}"))


def _read_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UsageError(
            f"{place}: expected text, got {short_repr(value)}{_advice_for_text(value)}"
        )
    # JSON can hold lone surrogates, which UTF-8 cannot.
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _advice_for_turn(message: Any, turn_keys: tuple[str, str]) -> str:
    """Return a remedy for a turn that has its role and its text under other keys, or has none."""
    if isinstance(message, Mapping):
        if turn_keys == _OF_SHAREGPT and _OF_CHAT[0] in message:
            return (
                f"rows with {' and '.join(_OF_CHAT)} are read with "
                f"dataset.messages_key={_SHAREGPT_KEY}"
            )
        if turn_keys == _OF_CHAT and _OF_SHAREGPT[0] in message:
            return f"turns with {' and '.join(_OF_SHAREGPT)} are read under {_SHAREGPT_KEY!r}"
    return "write one, or take the row out"


def _advice_for_text(value: Any) -> str:
    """Return a remedy for a value that is not a text."""
    if not isinstance(value, Sequence) or not value or not isinstance(value[0], Mapping):
        return "; write one, or take the row out"
    if "role" in value[0]:
        return "; write prompt and completion as one chat, under 'messages'"
    return "; write the parts of a message as one text"


def short_repr(value: Any) -> str:
    """Return a value as a message shows it: its repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
