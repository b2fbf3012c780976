"""The files of an entry of ``dataset.path``: text, or token files.

Everything is sorted: the same entry and files give the same order everywhere.
"""

import glob
import json
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from bridge.gpt.data.text.not_text import conversion_of_folder, reject_not_text
from bridge.gpt.data.text.text_files import open_text, text_suffix
from bridge.gpt.name_lists import join_first
from bridge.training.usage_error import UsageError

_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
# Files that hold rows. Their first bytes are checked in directories too, before the run starts.
_SUFFIXES_OF_ROWS = (".parquet", ".arrow", ".feather", ".orc", ".avro", ".zst")
_LONGEST_FIRST_LINE = 1 << 24
# Some distributions package the test suites apart. Without them, every machine with the same
# Python has the same text.
_NOT_STANDARD_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file of text, as it was when it was found."""

    path: Path
    size: int
    modified_ns: int
    is_chosen: bool = False
    """Whether the user named it, so that it must be text; False for one found in a directory."""

    def is_json_lines(self, key: str) -> bool:
        """Whether each line is a JSON object that holds one document under `key`.

        A .json file often has one document a line. It is taken for JSON Lines if the user named it,
        or if its first line has a text under the key.
        """
        suffix = text_suffix(self.path)
        if suffix in _JSON_LINES_SUFFIXES:
            return True
        if suffix != ".json":
            return False
        first = _first_object(self.path)
        return self.is_chosen or (first is not None and isinstance(first.get(key), str))


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of one entry of ``dataset.path``."""

    entry: str
    prefixes: tuple[str, ...] = ()
    """Token files: their paths without .bin and .idx."""
    files: tuple[TextFile, ...] = ()
    """Files of text, which are to be tokenized."""
    not_read: tuple[str, ...] = ()
    """Warnings about files that the entry matches and that are not read, one for each kind."""


def find_source(entry: str, *, field: str = "dataset.path") -> Source:
    """Find the files of an entry; only their beginnings are read.

    Args:
        entry: A text file, a directory (searched through, without hidden files), a glob of files,
            a JSON Lines file (.jsonl), each also compressed with gzip, bzip2 or xz, or the prefix
            of a .bin/.idx pair. Of a directory or glob with such pairs nothing else is read.
        field: The field or argument that the entry is from, for error messages.

    Raises:
        UsageError: Nothing is there, all of it is empty, or a file that the user named is not text.
    """
    path = Path(entry).expanduser()
    if not entry.strip():
        raise UsageError(f"{field}: an empty string is no path; give a file, directory or glob")
    halves = [Path(f"{path}.bin"), Path(f"{path}.idx")]
    if all(half.is_file() for half in halves):
        return Source(entry=entry, prefixes=(_absolute(path),))
    if path.is_dir():
        return _source_of_many(entry, _walk(path), field)
    if path.suffix in (".bin", ".idx"):
        return Source(entry=entry, prefixes=(_prefix_of_half(path, field),))
    if path.is_file():
        reject_not_text(path, f"{field}={entry!r}")
        _reject_json_document(path, f"{field}={entry!r}")
        return _source_of_files(entry, [_text_file(path, is_chosen=True)], field)
    if glob.has_magic(entry):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = [p for p in found if p.is_file()]
        folders = [p for p in found if p.is_dir() and not any(f.is_relative_to(p) for f in files)]
        return _source_of_many(entry, files, field, folders)
    for half in halves:
        if half.is_file():
            _prefix_of_half(half, field)
    raise UsageError(
        f"{field}={entry!r}: there is no such file, directory or .bin/.idx pair (looked for "
        f"{_absolute(path)}); give a text file, a directory, a glob, a .jsonl file, or the prefix "
        "of a .bin/.idx pair"
    )


def python_standard_library() -> Source:
    """Find the Python sources of the running interpreter's standard library, sorted, about 10 MB.

    Installed packages and the library's own test suites are not part of it.

    Raises:
        UsageError: The interpreter was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files = [
        _text_file(path)
        for path in sorted(root.rglob("*.py"))
        if not _NOT_STANDARD_LIBRARY.intersection(path.relative_to(root).parts) and path.is_file()
    ]
    return _source_of_files(str(root), files, "dataset.standard_library: " + str(root))


def _first_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in the first line of a file, None if the line is not one."""
    with open_text(path) as stream:
        try:
            first = json.loads(stream.readline(_LONGEST_FIRST_LINE))
        except (ValueError, RecursionError):
            return None
    return first if isinstance(first, dict) else None


def _reject_json_document(path: Path, name: str) -> None:
    """Reject a .json file that is one JSON document and not a row a line."""
    if text_suffix(path) == ".json" and path.stat().st_size and _first_object(path) is None:
        raise UsageError(
            f"{name}: is JSON and not JSON Lines; write a row a line, as with: jq -c '.[]' "
            f"{quote(str(path))} > {quote(f'{path.stem}.jsonl')} (or call it .txt to train on it "
            "as it is)"
        )


def _source_of_many(
    entry: str, paths: Sequence[Path], field: str, folders: Sequence[Path] = ()
) -> Source:
    """Return the source of a directory or glob; if it has token files, these alone.

    Args:
        entry: The entry.
        paths: Its files.
        field: The field or argument that the entry is from.
        folders: Folders that a glob matches and from which it matches no file; they are not read.
    """
    not_read = []
    if folders:
        not_read.append(
            f"{_listed(folders, 'folder')} matched by {entry!r}, which takes files alone (name a "
            "folder to read what is in it)"
        )
    for folder in sorted({path.parent for path in paths}):
        if conversion := conversion_of_folder(folder):
            raise UsageError(
                f"{field}={entry!r}: {folder} is a dataset of Hugging Face's save_to_disk, not "
                f"text; {conversion}"
            )
    for path in paths:
        if path.suffix in _SUFFIXES_OF_ROWS:
            reject_not_text(path, f"{field}={entry!r}: {path}")
    pairs = [path for path in paths if path.suffix == ".bin" and path.with_suffix(".idx").is_file()]
    if pairs:
        for path in paths:
            if path.suffix in (".bin", ".idx"):
                _prefix_of_half(path, field)
        prefixes = tuple(_absolute(path.with_suffix("")) for path in pairs)
        if others := [path for path in paths if path.suffix not in (".bin", ".idx")]:
            not_read.append(
                f"{_listed(others, 'file')} next to the token files of {entry!r}, which are read "
                "alone (name the others to read them too)"
            )
        return Source(entry=entry, prefixes=prefixes, not_read=tuple(not_read))
    return _source_of_files(entry, [_text_file(path) for path in paths], field, not_read)


def _listed(paths: Sequence[Path], noun: str) -> str:
    counted = f"1 {noun} is" if len(paths) == 1 else f"{len(paths)} {noun}s are"
    return f"{counted} not read: {join_first([str(path) for path in paths], 3)},"


def _source_of_files(
    entry: str, files: Sequence[TextFile], field: str, not_read: Sequence[str] = ()
) -> Source:
    if not files:
        detail = f" ({'; '.join(not_read)})" if not_read else ""
        raise UsageError(f"{field}={entry!r}: no file is there{detail}; give files that hold text")
    if not any(file.size for file in files):
        what = "the file is empty" if len(files) == 1 else f"all {len(files)} files are empty"
        raise UsageError(f"{field}={entry!r}: {what}; give files that hold text")
    return Source(entry=entry, files=tuple(files), not_read=tuple(not_read))


def _walk(root: Path) -> list[Path]:
    """Return the files below a directory, through links too; each directory is read once."""
    found, entered = [], {os.path.realpath(root)}

    def is_new(place: str) -> bool:
        known = place in entered
        entered.add(place)
        return not known

    for directory, subdirectories, names in os.walk(root, followlinks=True):
        subdirectories[:] = [
            name
            for name in sorted(subdirectories)
            if name[0] != "."
            and name != "__pycache__"
            and is_new(os.path.realpath(os.path.join(directory, name)))
        ]
        found += [Path(directory, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _text_file(path: Path, *, is_chosen: bool = False) -> TextFile:
    status = path.stat()
    return TextFile(
        path=Path(_absolute(path)),
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        is_chosen=is_chosen,
    )


def _prefix_of_half(path: Path, field: str) -> str:
    prefix = path.with_suffix("")
    missing = [half for half in (f"{prefix}.bin", f"{prefix}.idx") if not Path(half).is_file()]
    if missing:
        raise UsageError(
            f"{field}={str(path)!r}: {' and '.join(missing)} missing; token files come in pairs, "
            "made by 'bridge data build'"
        )
    return _absolute(prefix)


def _absolute(path: Path) -> str:
    return os.path.abspath(path)
