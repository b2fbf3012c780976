"""Rows of instruction data on disk: JSON Lines, JSON lists and Hugging Face datasets."""

import codecs
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from bridge.gpt.data.sft.rows.conversations import (
    Conversation,
    RowKeys,
    extra_keys_of,
    read_conversation,
    short_repr,
)
from bridge.gpt.data.sft.rows.extra_keys import ExtraKeys
from bridge.gpt.data.text.not_text import reject_not_text
from bridge.gpt.data.text.text_files import open_text, read_json_lines
from bridge.training.file_kinds import HEAD_BYTES
from bridge.training.usage_error import UsageError

JSON_LINES = {"train": "training.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
"""The files of rows in a directory, by split."""

_SPLITS_OF_HUGGING_FACE = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


class RowSource(Protocol):
    """The rows of one split."""

    def files(self) -> Sequence[Path]:
        """Return the files that the rows come from, in a fixed order."""
        ...

    def check(self) -> dict[str, int]:
        """Check all rows; return the number of rows with each ignored key.

        Raises:
            UsageError: Rows are malformed, or have keys that are neither read nor ignored. The
                message names the first malformed row and all such keys.
        """
        ...

    def conversations(self) -> Iterator[Conversation]:
        """Yield the conversations of all rows, in order.

        Raises:
            UsageError: A row is malformed; the message has its place and the reason.
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
        """Check for malformed rows and extra keys (see `RowSource`)."""
        extra = ExtraKeys(self.keys.ignored)
        malformed: list[str] = []
        for place, record in self._records():
            extra.add(extra_keys_of(record, self.keys), place.removeprefix(f"{self.path}, "))
            try:
                read_conversation(record, place, self.keys)
            except UsageError as error:
                malformed.append(str(error))
        problems = malformed[:1]
        if len(malformed) > 1:
            problems.append(f"{len(malformed)} rows in all are malformed")
        if problem := extra.problem():
            problems.append(problem if malformed else f"{self.path}: {problem}")
        if problems:
            raise UsageError("; ".join(problems))
        return extra.rows_with_ignored()

    def conversations(self) -> Iterator[Conversation]:
        """Yield the conversations of all rows (see `RowSource`)."""
        for place, record in self._records():
            yield read_conversation(record, place, self.keys)

    def _records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if self.kind == "json lines":
            return _json_lines(self.path)
        return _hugging_face(self.path, self.split)


def find_rows(path: str, field: str, keys: RowKeys) -> dict[str, StoredRows]:
    """Return the rows at a user's path, by split.

    A file is for training: JSON Lines or a JSON list of rows, also compressed with gzip, bzip2 or
    xz. A directory has files by the names of `JSON_LINES`, or is a Hugging Face dataset as its
    ``save_to_disk`` writes it: of several splits, or of one, which is for training.

    Args:
        path: A file or a directory.
        field: The field of the path, for messages.
        keys: The keys of the rows.

    Raises:
        UsageError: No rows are there; the message names the files that are.
    """
    place = Path(path).expanduser().absolute()
    if place.is_file():
        if place.stat().st_size == 0:
            raise UsageError(f"{field}={path!r}: the file is empty; give one with a row a line")
        reject_not_text(place, f"{field}={path!r}")
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
            reject_not_text(entry, f"{field}={path!r}: {entry}")
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


def reject_missing_library(source: StoredRows, field: str) -> None:
    """Reject rows that need the package datasets if it is not installed.

    Raises:
        UsageError: It is not installed; the message has the command that installs it.
    """
    if source.kind == "hugging face" and importlib.util.find_spec("datasets") is None:
        raise UsageError(
            f"{field}: {source.path} is a Hugging Face dataset, which needs the package datasets, "
            "and it is not installed; install it with: pip install datasets (with uv: uv run "
            "--with datasets bridge ...), or write the rows to JSON Lines"
        )


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a file, lines or the items of one list, each with its place."""
    with open_text(path) as stream:
        beginning = stream.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if beginning.startswith(b"["):
        yield from _json_list(path)
        return
    for place, record in read_json_lines(path):
        if not isinstance(record, dict):
            raise UsageError(
                f"{place}: expected an object with keys, got {short_repr(record)}; write an "
                "object a line"
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
                f"{path}, item {number}: expected an object with keys, got {short_repr(record)}; "
                "write a list of objects"
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
