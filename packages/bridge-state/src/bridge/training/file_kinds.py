"""Kinds of files, recognized by their content: text, or a format that users mistake for text."""

import codecs
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, override

HEAD_BYTES = 4096
"""The number of bytes at a file's beginning that `kind_of` needs."""
_CHUNK_BYTES = 1 << 20


class FileKind(StrEnum):
    """Kinds of files that are not text; the value is a noun for messages."""

    GZIP = "a gzip file"
    BZIP2 = "a bzip2 file"
    XZ = "an xz file"
    ZSTD = "a zstd file"
    LZ4 = "an lz4 file"
    ZIP = "a zip archive (.zip, .npz, .pt, .docx)"
    SEVEN_ZIP = "a 7z archive"
    TAR = "a tar archive"
    PARQUET = "a Parquet file"
    ARROW = "an Arrow file"
    ARROW_STREAM = "an Arrow stream"
    AVRO = "an Avro file"
    ORC = "an ORC file"
    HDF5 = "an HDF5 file"
    SQLITE = "an SQLite database"
    NUMPY = "a NumPy array"
    PICKLE = "a pickle"
    SAFETENSORS = "a safetensors file"
    GGUF = "a GGUF file"
    TOKEN_INDEX = "the index of token files, half of a .bin/.idx pair"
    PDF = "a PDF document"
    OLD_OFFICE = "an Office document"
    PNG = "a PNG image"
    JPEG = "a JPEG image"
    GIF = "a GIF image"
    RIFF = "a sound, image or video file"
    OGG = "an Ogg file"
    MP3 = "an MP3 file"
    ELF = "a program or library"
    WINDOWS_PROGRAM = "a Windows program or library"
    BYTECODE = "compiled Python"
    UTF_32 = "text in UTF-32"
    UTF_16 = "text in UTF-16"
    LFS_POINTER = "Git LFS's pointer to a file"


_MAGIC: tuple[tuple[int, bytes, FileKind], ...] = (
    (0, b"\x1f\x8b", FileKind.GZIP),
    (0, b"BZh", FileKind.BZIP2),
    (0, b"\xfd7zXZ\0", FileKind.XZ),
    (0, b"\x28\xb5\x2f\xfd", FileKind.ZSTD),
    (0, b"\x04\x22\x4d\x18", FileKind.LZ4),
    (0, b"PK\x03\x04", FileKind.ZIP),
    (0, b"PK\x05\x06", FileKind.ZIP),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind.SEVEN_ZIP),
    (257, b"ustar", FileKind.TAR),
    (0, b"PAR1", FileKind.PARQUET),
    (0, b"ARROW1", FileKind.ARROW),
    (0, b"\xff\xff\xff\xff", FileKind.ARROW_STREAM),
    (0, b"Obj\x01", FileKind.AVRO),
    (0, b"ORC", FileKind.ORC),
    (0, b"\x89HDF\r\n\x1a\n", FileKind.HDF5),
    (0, b"SQLite format 3\0", FileKind.SQLITE),
    (0, b"\x93NUMPY", FileKind.NUMPY),
    *((0, bytes([0x80, protocol]), FileKind.PICKLE) for protocol in range(2, 6)),
    (0, b"GGUF", FileKind.GGUF),
    (0, b"MMIDIDX", FileKind.TOKEN_INDEX),
    (0, b"%PDF-", FileKind.PDF),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", FileKind.OLD_OFFICE),
    (0, b"\x89PNG", FileKind.PNG),
    (0, b"\xff\xd8\xff", FileKind.JPEG),
    (0, b"GIF8", FileKind.GIF),
    (0, b"RIFF", FileKind.RIFF),
    (4, b"ftyp", FileKind.RIFF),
    (0, b"OggS", FileKind.OGG),
    (0, b"ID3", FileKind.MP3),
    (0, b"\x7fELF", FileKind.ELF),
    (0, b"MZ", FileKind.WINDOWS_PROGRAM),
    (2, b"\r\n", FileKind.BYTECODE),
    (0, b"\xff\xfe\0\0", FileKind.UTF_32),
    (0, b"\0\0\xfe\xff", FileKind.UTF_32),
    (0, b"\xff\xfe", FileKind.UTF_16),
    (0, b"\xfe\xff", FileKind.UTF_16),
)


@dataclass(frozen=True, kw_only=True)
class WrongByte:
    """The first byte of a file that is not part of text."""

    offset: int
    """From 0."""
    line: int
    """From 1."""
    value: int

    @override
    def __str__(self) -> str:
        what = "is NUL" if self.value == 0 else f"is 0x{self.value:02X} and not UTF-8"
        return f"byte {self.offset}, in line {self.line}, {what}"


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as stream:
        return stream.read(HEAD_BYTES)


def kind_of(head: bytes) -> FileKind | None:
    """Return the kind of a file that begins with `head`; None for text and unknown formats."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return FileKind.LFS_POINTER
    if is_text(head):
        return None
    # Eight bytes with the length of the header, which is JSON.
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        return FileKind.SAFETENSORS
    for offset, magic, kind in _MAGIC:
        if head.startswith(magic, offset):
            return kind
    return None


def is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8 without NUL; the last character may be incomplete."""
    if b"\0" in head:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def first_wrong_byte(stream: BinaryIO) -> WrongByte | None:
    """Return the first byte of a file that is not part of text, None if all of it is text.

    Text is UTF-8 without NUL; the last character may be incomplete.

    Args:
        stream: The file, at its beginning; it is read up to the byte, or to its end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1
    while chunk := stream.read(_CHUNK_BYTES):
        # The beginning of a character that the last chunk has cut.
        begun = decoder.getstate()[0]
        found = [chunk.find(b"\0")] if b"\0" in chunk else []
        if begun or not chunk.isascii():
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                found.append(error.start - len(begun))
        if found:
            position = min(found)
            return WrongByte(
                offset=offset + position,
                line=line + chunk.count(b"\n", 0, max(0, position)),
                value=chunk[position] if position >= 0 else begun[position + len(begun)],
            )
        offset += len(chunk)
        line += chunk.count(b"\n")
    return None
