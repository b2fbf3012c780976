"""Rejection of files that are not text.

The message has the kind of the file, or the position of the first byte that is not text. For kinds
that hold rows, the message also has the command that converts the file to JSON Lines.
"""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from bridge.gpt.data.text.text_files import COMPRESSED, COMPRESSION_SUFFIXES, UNPACKING, open_text
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

HOLDS_ROWS = frozenset(
    {
        *(FileKind.PARQUET, FileKind.ARROW, FileKind.ARROW_STREAM, FileKind.AVRO, FileKind.ORC),
        FileKind.ZSTD,
    }
)
"""Kinds in which corpora are stored: skipping them in a directory would skip the data."""


@dataclass(frozen=True, kw_only=True)
class NotText:
    """The reason why a file is not text."""

    path: Path
    kind: FileKind | None
    """The kind of the file, if it is known."""
    compression: FileKind | None
    """The kind of its compression, if it is compressed."""
    wrong: WrongByte | None = None
    """The first byte that is not text, after decompression."""

    def describe(self) -> str:
        """Describe the file in a few words."""
        if self.kind is None:
            return "binary data" if self.wrong is None or self.wrong.value == 0 else "not UTF-8"
        return f"{self.compression} of {self.kind}" if self.compression else str(self.kind)

    def problem(self, name: str) -> str:
        """Return the message that rejects the file, which the user calls `name`."""
        if self.kind is not None:
            return f"{name}: is {self.describe()}, not text; {self._remedy(self.kind)}"
        assert self.wrong is not None
        if self.wrong.value == 0:
            return f"{name}: is not text ({self.wrong}); give files of text"
        return (
            f"{name}: is not text in UTF-8 ({self.wrong}); convert it, as with: "
            f"{self._utf8_command('latin1')}"
        )

    def _remedy(self, kind: FileKind) -> str:
        if kind in (FileKind.UTF_16, FileKind.UTF_32):
            return f"give what comes of it: {self._utf8_command(kind.removeprefix('text in '))}"
        return _remedy_for_kind(kind, str(self.path))

    def _utf8_command(self, encoding: str) -> str:
        """Return the command that converts the file to UTF-8; the new file has the same suffix."""
        name = self.path.name
        unpack = ""
        compression = kind_of(head_of(self.path))
        if compression in UNPACKING:
            unpack = f"{UNPACKING[compression]} < {quote(str(self.path))} | "
            if self.path.suffix.lower() in COMPRESSION_SUFFIXES:
                name = self.path.stem
        made = Path(name)
        source = "" if unpack else f" {quote(str(self.path))}"
        return (
            f"{unpack}iconv -f {encoding} -t utf-8{source} > "
            f"{quote(f'{made.stem}-utf8{made.suffix}')}"
        )


def check_beginning(path: Path) -> NotText | None:
    """Return why the first bytes of a file are not text, None if they are."""
    head = head_of(path)
    compression = kind_of(head)
    if compression in COMPRESSED:
        with open_text(path) as stream:
            head = stream.read(HEAD_BYTES)
    else:
        compression = None
    if is_text(head) and kind_of(head) is None:
        return None
    with open_text(path) as stream:
        wrong = first_wrong_byte(stream)
    return NotText(path=path, kind=kind_of(head), compression=compression, wrong=wrong)


def check_text(path: Path) -> NotText | None:
    """Return why a file is not text, None if all of it is."""
    with open_text(path) as stream:
        wrong = first_wrong_byte(stream)
    if found := check_beginning(path):
        return found
    if wrong is None:
        return None
    return NotText(path=path, kind=None, compression=None, wrong=wrong)


def reject_not_text(path: Path, name: str) -> None:
    """Reject a file that the user calls `name` if its first bytes are not text.

    Raises:
        UsageError: They are not; the message has the file's kind and a remedy.
    """
    if found := check_beginning(path):
        raise UsageError(found.problem(name))


def conversion_of_folder(folder: Path) -> str | None:
    """Return how to convert a folder that Hugging Face's save_to_disk wrote; None for others."""
    load = f"import datasets; datasets.load_from_disk({str(folder)!r})"
    if (folder / "dataset_dict.json").is_file():
        return (
            f'convert it, each split by itself: python -c "{load}[{"train"!r}].to_json('
            f'{f"{folder.name}-train.jsonl"!r})"'
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return f'convert it: python -c "{load}.to_json({f"{folder.name}.jsonl"!r})"'
    return None


def _remedy_for_kind(kind: FileKind, path: str) -> str:
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
