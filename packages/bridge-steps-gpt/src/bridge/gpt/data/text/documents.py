"""Documents of text files.

megatron-core splits data into train, validation and test by whole documents, so a long file is cut
into many. The same files give the same documents in the same order.
"""

import json
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bridge.gpt.data.text.not_text import HOLDS_ROWS, check_beginning, check_text
from bridge.gpt.data.text.sources import TextFile
from bridge.gpt.data.text.text_files import mapped_text, read_json_lines
from bridge.training.usage_error import UsageError

LARGEST_TARGET_BYTES = 16 * 1024
"""Size of the documents that a large corpus is cut into."""
SMALLEST_TARGET_BYTES = 512
"""Size of the documents that a tiny corpus is cut into."""
DOCUMENTS_WANTED = 200
"""A small corpus is cut finer to get this many, so that a split of one percent is not empty."""

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


def read_text_documents(
    files: Sequence[TextFile], *, json_key: str = "text", skipped: list[str] | None = None
) -> Iterator[bytes]:
    """Read files one after the other and yield their documents; none is empty.

    A file is a document. A large file is cut at blank lines, else at line ends, else anywhere
    between two UTF-8 characters. A line of JSON Lines is a document, and is not cut.

    Args:
        files: The files that `find_source` found.
        json_key: Key of the text in a line of JSON Lines; other keys are not read.
        skipped: A list to which files that are not text are added, each with its kind.

    Raises:
        UsageError: A file that the user named is not text; a file in a directory holds rows in a
            form that is not read; or a line of JSON Lines is no object with text under `json_key`.
    """
    files = [file for file in files if file.size > 0]
    of_lines = [file.is_json_lines(json_key) for file in files]
    plain = [file.size for file, has_lines in zip(files, of_lines, strict=True) if not has_lines]
    target = target_bytes(sum(plain))
    for file, has_lines in zip(files, of_lines, strict=True):
        # json.loads rejects what is not text, so the beginning is enough.
        if found := (check_beginning if has_lines else check_text)(file.path):
            if file.is_chosen or found.kind in HOLDS_ROWS:
                raise UsageError(found.problem(str(file.path)))
            if skipped is not None:
                skipped.append(f"{file.path} ({found.describe()})")
        elif has_lines:
            yield from _read_json_lines(file.path, json_key)
        else:
            yield from _read_plain_text(file.path, target)


def count_documents(files: Sequence[TextFile]) -> list[int]:
    """Return the number of documents in each file of text."""
    target = target_bytes(sum(file.size for file in files))
    return [
        0 if file.size == 0 else sum(1 for _ in _read_plain_text(file.path, target))
        for file in files
    ]


def target_bytes(corpus_bytes: int) -> int:
    """Return the size in bytes of the documents that a corpus of this size is cut into."""
    return max(SMALLEST_TARGET_BYTES, min(LARGEST_TARGET_BYTES, corpus_bytes // DOCUMENTS_WANTED))


def cut_text(text: bytes | mmap.mmap, target: int) -> Iterator[bytes]:
    """Cut text into pieces of about `target` bytes, which joined are the text again."""
    start, end = 0, len(text)
    while end - start > target + target // 2:
        stop = _cut_position(text, start, target)
        yield bytes(text[start:stop])
        start = stop
    if start < end:
        yield bytes(text[start:end])


def _cut_position(text: bytes | mmap.mmap, start: int, target: int) -> int:
    blank_line = _BLANK_LINE.search(text, start + target, start + 2 * target)
    if blank_line is not None:
        return blank_line.end()
    line_end = text.find(b"\n", start + target, start + 2 * target)
    if line_end >= 0:
        return line_end + 1
    stop = start + target
    # 0b10xxxxxx is the inside of a UTF-8 character, which has at most three such bytes.
    for back in range(4):
        if text[stop - back] & 0b1100_0000 != 0b1000_0000:
            return stop - back
    return stop


def _read_plain_text(path: Path, target: int) -> Iterator[bytes]:
    with mapped_text(path) as text:
        yield from cut_text(text, target)


def _read_json_lines(path: Path, key: str) -> Iterator[bytes]:
    for place, record in read_json_lines(path):
        if not isinstance(record, dict):
            raise UsageError(
                f"{place}: no text under the key {key!r}, since it is no object; write an object "
                f"a line, as {{{json.dumps(key)}: ...}}"
            )
        text = record.get(key)
        if not isinstance(text, str):
            keys = ", ".join(record) or "nothing"
            remedy = "write a text there, or take the line out"
            if key not in record:
                remedy = "name the right one with dataset.json_key (bridge data build: --json-key)"
            raise UsageError(f"{place}: no text under the key {key!r} (there is: {keys}); {remedy}")
        if text:
            # JSON can hold lone surrogates, which UTF-8 cannot.
            yield text.encode("utf-8", errors="replace")
