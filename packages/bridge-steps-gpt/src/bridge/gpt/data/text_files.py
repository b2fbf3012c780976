"""Files of text as users have them: plain, or compressed with gzip, bzip2 or xz.

Anything else is rejected by what it is, with the place of the first byte that is not text and,
for kinds that hold rows, with the command that makes JSON Lines of it.
"""

import bz2
import gzip
import json
import lzma
import mmap
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

from bridge.training.file_kinds import (
    HEAD_BYTES,
    FileKind,
    WrongByte,
    first_wrong_byte,
    head_of,
    is_text,
    kind_of,
)
from bridge.training.usage_error import UsageError

_COMPRESSED: dict[FileKind | None, Callable[..., Any]] = {
    FileKind.GZIP: gzip.open,
    FileKind.BZIP2: bz2.open,
    FileKind.XZ: lzma.open,
}
_COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz")
_UNPACKING: dict[FileKind | None, str] = {
    FileKind.GZIP: "gzip -dc",
    FileKind.BZIP2: "bzip2 -dc",
    FileKind.XZ: "xz -dc",
}

HOLDS_ROWS = frozenset(
    {
        *(FileKind.PARQUET, FileKind.ARROW, FileKind.ARROW_STREAM, FileKind.AVRO, FileKind.ORC),
        FileKind.ZSTD,
    }
)
"""Kinds that a corpus is stored in: to skip them in a directory would be to skip the data."""


@dataclass(frozen=True, kw_only=True)
class NotText:
    """Why a file is not text."""

    path: Path
    kind: FileKind | None
    """Its kind, if that is known."""
    packed: FileKind | None
    """Its compression."""
    wrong: WrongByte | None = None
    """The first byte that is not text, after decompression."""

    def what(self) -> str:
        """Return what the file is, in a few words."""
        if self.kind is None:
            return "binary data" if self.wrong is None or self.wrong.value == 0 else "not UTF-8"
        return f"{self.packed} of {self.kind}" if self.packed else str(self.kind)

    def problem(self, name: str) -> str:
        """Return the line that rejects the file, which the user calls `name`."""
        if self.kind is not None:
            return f"{name}: is {self.what()}, not text; {self._remedy(self.kind)}"
        assert self.wrong is not None
        if self.wrong.value == 0:
            return f"{name}: is not text ({self.wrong}); give files of text"
        return (
            f"{name}: is not text in UTF-8 ({self.wrong}); convert it, as with: "
            f"{self._converted('latin1')}"
        )

    def _remedy(self, kind: FileKind) -> str:
        if kind in (FileKind.UTF_16, FileKind.UTF_32):
            return f"give what comes of it: {self._converted(kind.removeprefix('text in '))}"
        return _remedy(kind, str(self.path))

    def _converted(self, encoding: str) -> str:
        """Return the command that makes UTF-8 of the file, which keeps its suffix."""
        name = self.path.name
        unpack = ""
        packed = kind_of(head_of(self.path))
        if packed in _UNPACKING:
            unpack = f"{_UNPACKING[packed]} < {quote(str(self.path))} | "
            if self.path.suffix.lower() in _COMPRESSION_SUFFIXES:
                name = self.path.stem
        made = Path(name)
        source = "" if unpack else f" {quote(str(self.path))}"
        return (
            f"{unpack}iconv -f {encoding} -t utf-8{source} > "
            f"{quote(f'{made.stem}-utf8{made.suffix}')}"
        )


def json_error(error: ValueError | RecursionError) -> str:
    """Return why a line is not JSON, without the line number that counts within it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at character {error.pos + 1}"
    return str(error)


def text_suffix(path: Path) -> str:
    """Return a file's suffix in lower case, without that of its compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSION_SUFFIXES else suffix


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed in a way that is read here."""
    return kind_of(head_of(path)) in _COMPRESSED


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed.

    Raises:
        UsageError: The compressed file is damaged or cut off.
    """
    kind = kind_of(head_of(path))
    if kind not in _COMPRESSED:
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with _COMPRESSED[kind](path, "rb") as stream:
            yield stream
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(
            f"{path}: is {kind} that cannot be decompressed ({error}); get it again, or leave it "
            "out"
        ) from error


@contextmanager
def mapped_text(path: Path) -> Iterator[bytes | mmap.mmap]:
    """Map the text of a file into memory; that of a compressed one by way of a temporary file."""
    with open_text(path) as stream:
        if not is_compressed(path):
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
                yield text
            return
        with tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(stream, plain, 1 << 20)
            plain.flush()
            if plain.tell() == 0:
                yield b""
                return
            with mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as text:
                yield text


def beginning_not_text(path: Path) -> NotText | None:
    """Return why the first bytes of a file are not text, None if they are."""
    head = head_of(path)
    packed = kind_of(head)
    if packed in _COMPRESSED:
        with open_text(path) as stream:
            head = stream.read(HEAD_BYTES)
    else:
        packed = None
    if is_text(head) and kind_of(head) is None:
        return None
    with open_text(path) as stream:
        wrong = first_wrong_byte(stream)
    return NotText(path=path, kind=kind_of(head), packed=packed, wrong=wrong)


def not_text(path: Path) -> NotText | None:
    """Return why a file is not text, None if all of it is."""
    with open_text(path) as stream:
        wrong = first_wrong_byte(stream)
    if found := beginning_not_text(path):
        return found
    if wrong is None:
        return None
    return NotText(path=path, kind=None, packed=None, wrong=wrong)


def reject_what_is_not_text(path: Path, name: str) -> None:
    """Reject a file that the user calls `name`, if its first bytes are not text.

    Raises:
        UsageError: With what it is and what to do.
    """
    if found := beginning_not_text(path):
        raise UsageError(found.problem(name))


def conversion_of_folder(folder: Path) -> str | None:
    """Return what to do with a folder that Hugging Face's save_to_disk wrote; None for others."""
    load = f"import datasets; datasets.load_from_disk({str(folder)!r})"
    if (folder / "dataset_dict.json").is_file():
        return (
            f'convert it, each split by itself: python -c "{load}[{"train"!r}].to_json('
            f'{f"{folder.name}-train.jsonl"!r})"'
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return f'convert it: python -c "{load}.to_json({f"{folder.name}.jsonl"!r})"'
    return None


def _remedy(kind: FileKind, path: str) -> str:
    lines = f"{Path(path).stem}.jsonl"
    to_json = f"to_json({lines!r}, orient='records', lines=True)"
    match kind:
        case FileKind.PARQUET:
            code = f"import pandas; pandas.read_parquet({path!r}).{to_json}"
        case FileKind.ARROW:
            code = f"import pandas; pandas.read_feather({path!r}).{to_json}"
        case FileKind.ARROW_STREAM:
            code = f"import pyarrow.ipc as ipc; ipc.open_stream({path!r}).read_pandas().{to_json}"
        case FileKind.ORC:
            code = f"import pandas; pandas.read_orc({path!r}).{to_json}"
        case _:
            unpack = {
                FileKind.ZSTD: f"zstd -d {quote(path)}",
                FileKind.LZ4: f"lz4 -d {quote(path)}",
                FileKind.ZIP: f"unzip {quote(path)}",
                FileKind.SEVEN_ZIP: f"7z x {quote(path)}",
                FileKind.TAR: f"tar -xf {quote(path)}",
                FileKind.LFS_POINTER: f"git lfs pull --include {quote(path)}",
            }
            if kind in unpack:
                return f"give what comes of it: {unpack[kind]}"
            return "give text, or JSON Lines with a text a line"
    return f'convert it and give {lines}: python -c "{code}" (with pandas and pyarrow)'
