"""Text files: plain, or compressed with gzip, bzip2 or xz."""

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
from pathlib import Path
from typing import Any, BinaryIO

from bridge.training.file_kinds import FileKind, head_of, kind_of
from bridge.training.usage_error import UsageError

COMPRESSED: dict[FileKind | None, Callable[..., Any]] = {
    FileKind.GZIP: gzip.open,
    FileKind.BZIP2: bz2.open,
    FileKind.XZ: lzma.open,
}
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz")
UNPACKING: dict[FileKind | None, str] = {
    FileKind.GZIP: "gzip -dc",
    FileKind.BZIP2: "bzip2 -dc",
    FileKind.XZ: "xz -dc",
}


def text_suffix(path: Path) -> str:
    """Return a file's suffix in lower case; a compression's suffix is removed first."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSION_SUFFIXES else suffix


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed.

    Raises:
        UsageError: The compressed file is damaged or cut off.
    """
    kind = kind_of(head_of(path))
    if kind not in COMPRESSED:
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with COMPRESSED[kind](path, "rb") as stream:
            yield stream
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(
            f"{path}: is {kind} that cannot be decompressed ({error}); get it again, or leave it "
            "out"
        ) from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place of each line of JSON Lines, for messages, and its value; skip blank lines.

    Raises:
        UsageError: A line is not JSON.
    """
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(error)
                if isinstance(error, json.JSONDecodeError):
                    # The error's own line number counts within this line.
                    reason = f"{error.msg}, at character {error.pos + 1}"
                raise UsageError(
                    f"{place}: not JSON ({reason}); write an object a line, in UTF-8"
                ) from None
            yield place, value


@contextmanager
def mapped_text(path: Path) -> Iterator[bytes | mmap.mmap]:
    """Map the text of a file into memory; a compressed file is unpacked to a temporary one."""
    with open_text(path) as stream:
        if kind_of(head_of(path)) not in COMPRESSED:
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
