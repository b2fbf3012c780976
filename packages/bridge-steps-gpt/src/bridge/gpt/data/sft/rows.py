"""Where the rows of instruction data are, and what is in one.

A row is a JSON object, or a row of a Hugging Face dataset, in one of three forms:

    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

Other keys are rejected, unless the user gives them up.
"""

import codecs
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from bridge.gpt.data.sft.unused_keys import Holder, UnusedKeys, unused_in
from bridge.gpt.data.text_files import json_error, open_text, reject_what_is_not_text
from bridge.training.file_kinds import HEAD_BYTES
from bridge.training.spelling import did_you_mean
from bridge.training.usage_error import UsageError

JSON_LINES = {"train": "training.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
"""The files of a directory, by split."""

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
"""Who may speak in a chat."""

_SPLITS_OF_HUGGING_FACE = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_SHAREGPT_KEY = "conversations"
_SHAREGPT_ROLES = {"human": "user", "gpt": ASSISTANT}
# Where a turn has its role and its text.
_OF_CHAT = ("role", "content")
_OF_SHAREGPT = ("from", "value")
_PREFERENCE_KEYS = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side says."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a row holds."""

    place: str
    """Where the row stands, for messages."""
    turns: tuple[Turn, ...]
    is_chat: bool
    """False for a prompt and its completion, which are its two turns."""


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """Under which keys a row has what."""

    prompt: str
    completion: str
    messages: str
    ignored: tuple[str, ...] = ()
    """Keys of rows and turns that the user gives up (dataset.ignore_keys)."""


class RowSource(Protocol):
    """The rows of one split."""

    def files(self) -> Sequence[Path]:
        """Return the files that the rows come from, in a fixed order."""
        ...

    def check(self) -> dict[str, int]:
        """Read all rows once; return how many have each of the keys that are given up.

        Raises:
            UsageError: Rows are malformed, or have keys that are neither read nor given up. The
                message names the first malformed row and all such keys.
        """
        ...

    def conversations(self) -> Iterator[Conversation]:
        """Read all rows, in their order.

        Raises:
            UsageError: A row is malformed; the message says where it stands and why.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """Rows of a JSON Lines file, or of a Hugging Face dataset on disk."""

    kind: Literal["json lines", "hugging face"]
    path: Path
    keys: RowKeys
    split: str | None = None
    """The name of the split in a Hugging Face dataset of several."""

    def files(self) -> list[Path]:
        """Return the files that the rows are in, sorted."""
        if self.kind == "json lines":
            return [self.path]
        return sorted(path for path in self.path.rglob("*") if path.is_file())

    def check(self) -> dict[str, int]:
        """Look for malformed rows and keys that are not read (see `RowSource`)."""
        unused = UnusedKeys(self.keys.ignored)
        malformed: list[str] = []
        for place, record in self._records():
            unused.add(unused_keys_of(record, self.keys), place.removeprefix(f"{self.path}, "))
            try:
                conversation_of(record, place, self.keys)
            except UsageError as error:
                malformed.append(str(error))
        problems = malformed[:1]
        if len(malformed) > 1:
            problems.append(f"{len(malformed)} rows in all are malformed")
        if problem := unused.problem():
            problems.append(problem if malformed else f"{self.path}: {problem}")
        if problems:
            raise UsageError("; ".join(problems))
        return unused.rows_with_ignored()

    def conversations(self) -> Iterator[Conversation]:
        """Read all rows (see `RowSource`)."""
        for place, record in self._records():
            yield conversation_of(record, place, self.keys)

    def _records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if self.kind == "json lines":
            return _json_lines(self.path)
        return _hugging_face(self.path, self.split)


def find_rows(path: str, field: str, keys: RowKeys) -> dict[str, StoredRows]:
    """Find the rows that a user's path means, by the split that they are for.

    A file is for training: JSON Lines or a JSON list of rows, also compressed with gzip, bzip2 or
    xz. A directory has files by the names of `JSON_LINES`, or is a Hugging
    Face dataset as its ``save_to_disk`` writes it, of several splits or of one, for training.

    Args:
        path: A JSON Lines file or a directory.
        field: What the user calls the path, for messages.
        keys: What the rows have where.

    Raises:
        UsageError: No rows are there; the message says what is.
    """
    place = Path(path).expanduser().absolute()
    if place.is_file():
        if place.stat().st_size == 0:
            raise UsageError(f"{field}={path!r}: the file is empty; give one with a row a line")
        reject_what_is_not_text(place, f"{field}={path!r}")
        return {"train": StoredRows(kind="json lines", path=place, keys=keys)}
    if not place.is_dir():
        raise UsageError(
            f"{field}={path!r}: there is no such file or directory (looked for {place}); give a "
            f"JSON Lines file, or a directory with {JSON_LINES['train']}"
        )
    if (place / "dataset_dict.json").is_file():
        return _splits_of_hugging_face(place, path, field, keys)
    if (place / "dataset_info.json").is_file() and (place / "state.json").is_file():
        return {"train": StoredRows(kind="hugging face", path=place, keys=keys)}
    found = {
        split: StoredRows(kind="json lines", path=place / name, keys=keys)
        for split, name in JSON_LINES.items()
        if (place / name).is_file()
    }
    if not found:
        present = sorted(entry.name for entry in place.iterdir())
        for entry in sorted(place.rglob("*.parquet")):
            reject_what_is_not_text(entry, f"{field}={path!r}: {entry}")
        raise UsageError(
            f"{field}={path!r}: neither {', '.join(JSON_LINES.values())} nor a Hugging Face "
            f"dataset is in this directory (there is {', '.join(present[:8]) or 'nothing'}); give "
            "the files those names, or the path of one file"
        )
    return found


def _splits_of_hugging_face(
    place: Path, path: str, field: str, keys: RowKeys
) -> dict[str, StoredRows]:
    names: list[str] = json.loads((place / "dataset_dict.json").read_text())["splits"]
    found = {
        split: StoredRows(kind="hugging face", path=place, split=name, keys=keys)
        for split, known in _SPLITS_OF_HUGGING_FACE.items()
        for name in known
        if name in names
    }
    if not found:
        raise UsageError(
            f"{field}={path!r}: the Hugging Face dataset has the splits {', '.join(names)}; it "
            f"needs {', '.join(_SPLITS_OF_HUGGING_FACE)}"
        )
    return found


def refuse_missing_library(source: StoredRows, field: str) -> None:
    """Refuse rows that only the package datasets can read, where it is not installed.

    Raises:
        UsageError: With the line that installs it.
    """
    if source.kind == "hugging face" and importlib.util.find_spec("datasets") is None:
        raise UsageError(
            f"{field}: {source.path} is a Hugging Face dataset, which needs the package datasets, "
            "and it is not installed; install it with: pip install datasets (with uv: uv run "
            "--with datasets bridge ...), or write the rows to JSON Lines"
        )


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a file, a line each or items of one list, each with its place."""
    with open_text(path) as stream:
        beginning = stream.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if beginning.startswith(b"["):
        yield from _json_list(path)
        return
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"{place}: not JSON ({json_error(error)}); write an object a line, in UTF-8"
                ) from None
            if not isinstance(record, dict):
                raise UsageError(
                    f"{place}: expected an object with keys, got {_shown(record)}; write an object "
                    "a line"
                )
            yield place, record


def _json_list(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open_text(path) as stream:
        try:
            records = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path}: not a list of rows in JSON ({error}); write one, or an object a line"
            ) from None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UsageError(
                f"{path}, item {number}: expected an object with keys, got {_shown(record)}; write "
                "a list of objects"
            )
        yield f"{path}, item {number}", record


def _hugging_face(path: Path, split: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_from_disk  # type: ignore[import-untyped]

    rows: Any = load_from_disk(str(path))
    place = str(path)
    if split is not None:
        rows, place = rows[split], f"{place}, split {split}"
    for number, record in enumerate(rows):
        yield f"{place}, row {number}", record


def unused_keys_of(record: Mapping[str, Any], keys: RowKeys) -> Iterator[tuple[str, Holder]]:
    """Yield the keys of a row and of its turns that `conversation_of` does not read."""
    used: set[str]
    turn_keys: tuple[str, ...]
    if record.get(keys.messages) is not None:
        used, turn_keys = {keys.messages}, _OF_CHAT
    elif record.get(_SHAREGPT_KEY) is not None:
        used, turn_keys = {_SHAREGPT_KEY}, _OF_SHAREGPT
    elif all(key in record for key in (keys.prompt, keys.completion)):
        used, turn_keys = {keys.prompt, keys.completion}, ()
    else:
        return  # a malformed row, whose error tells what it has
    for key in unused_in(record, used):
        yield key, "rows"
    turns, role_key = record[next(iter(used))], next(iter(turn_keys), "")
    for turn in turns if turn_keys and isinstance(turns, Sequence) else ():
        # One without a role is malformed.
        if isinstance(turn, Mapping) and turn.get(role_key) is not None:
            for key in unused_in(turn, turn_keys):
                yield key, "turns"


def conversation_of(record: Mapping[str, Any], place: str, keys: RowKeys) -> Conversation:
    """Read a row.

    Raises:
        UsageError: It is malformed; the message says where it stands and why.
    """
    if record.get(keys.messages) is not None:
        turns = _turns(record[keys.messages], f"{place}: {keys.messages}", _OF_CHAT, keys)
        return Conversation(place=place, turns=turns, is_chat=True)
    if record.get(_SHAREGPT_KEY) is not None:
        turns = _turns(record[_SHAREGPT_KEY], f"{place}: {_SHAREGPT_KEY}", _OF_SHAREGPT, keys)
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
    texts = [_text(record[key], f"{place}: {key}") for key in (keys.prompt, keys.completion)]
    turns = (Turn(role="user", text=texts[0]), Turn(role=ASSISTANT, text=texts[1]))
    return Conversation(place=place, turns=turns, is_chat=False)


def _turns(
    messages: Any, place: str, turn_keys: tuple[str, str], keys: RowKeys
) -> tuple[Turn, ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError(
            f"{place}: expected a list of messages, got {_shown(messages)}; write one, as "
            f'[{{"{turn_keys[0]}": ..., "{turn_keys[1]}": ...}}], or take the row out'
        )
    return tuple(
        _turn(message, f"{place}[{number}]", turn_keys, keys)
        for number, message in enumerate(messages)
    )


def _turn(message: Any, place: str, turn_keys: tuple[str, str], keys: RowKeys) -> Turn:
    role_key, text_key = turn_keys
    if not isinstance(message, Mapping) or message.get(role_key) is None:
        raise UsageError(
            f"{place}: expected an object with {role_key!r} and {text_key!r}, got {_shown(message)}"
            f"; {_advice_for_turn(message, turn_keys)}"
        )
    role = message[role_key]
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise UsageError(
            f"{place}: the role {role!r} is none of {', '.join((*ROLES, *_SHAREGPT_ROLES))}"
            f"{did_you_mean(str(role), ROLES)}; write one of these, or take the row out"
        )
    text = message.get(text_key)
    if text is None and unused_in(message, {*turn_keys, *keys.ignored}):
        text = ""  # Its other keys say what it is, and are reported.
    return Turn(role=role, text=_text(text, f"{place}: {text_key}"))


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{place}: expected text, got {_shown(value)}{_advice_for(value)}")
    # JSON can hold lone surrogates, which UTF-8 cannot.
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _advice_for_turn(message: Any, turn_keys: tuple[str, str]) -> str:
    """Return what to do with a turn that has its role and its text elsewhere, or none."""
    if isinstance(message, Mapping):
        if turn_keys == _OF_SHAREGPT and _OF_CHAT[0] in message:
            return (
                f"rows with {' and '.join(_OF_CHAT)} are read with "
                f"dataset.messages_key={_SHAREGPT_KEY}"
            )
        if turn_keys == _OF_CHAT and _OF_SHAREGPT[0] in message:
            return f"turns with {' and '.join(_OF_SHAREGPT)} are read under {_SHAREGPT_KEY!r}"
    return "write one, or take the row out"


def _advice_for(value: Any) -> str:
    """Return what to do with what others write where a text stands here."""
    if not isinstance(value, Sequence) or not value or not isinstance(value[0], Mapping):
        return "; write one, or take the row out"
    if "role" in value[0]:
        return "; write prompt and completion as one chat, under 'messages'"
    return "; write the parts of a message as one text"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
