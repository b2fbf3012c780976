"""Files that are not plain text: compressed text is read, other kinds are rejected by name."""

import bz2
import gzip
import json
import lzma
import pickle
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.data.sft.rows.conversations import RowKeys
from bridge.gpt.data.sft.rows.row_files import find_rows
from bridge.gpt.data.text.documents import read_text_documents
from bridge.gpt.data.text.not_text import check_text
from bridge.gpt.data.text.sources import find_source
from bridge.training import file_kinds
from gpt_data import build_splits, container, write_pair, write_story

KEYS = RowKeys(prompt="prompt", completion="completion", messages="messages")
ROW = {"prompt": "p", "completion": "c"}
TEXT = "Grüße in 日本語\n" * 400


def write_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


def write_tar(path: Path) -> None:
    path.with_suffix(".inner").write_text("text")
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        archive.add(path.with_suffix(".inner"), "a.txt")
    path.with_suffix(".inner").unlink()


def write_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table t (a text)")
    database.close()


def write_safetensors(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def write_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.arange(4))


def write_index(path: Path) -> None:
    write_pair(path.parent / "pair", [[1, 2]])
    (path.parent / "pair.idx").rename(path)
    (path.parent / "pair.bin").unlink()


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


KINDS: list[tuple[str, Callable[[Path], object], str]] = [
    ("data.zip", write_archive, "is a zip archive.*unzip"),
    ("data.tar", write_tar, "is a tar archive.*tar -xf"),
    ("data.tar.gz", write_tar, "is a gzip file of a tar archive.*tar -xf"),
    ("text.txt", write_database, "is an SQLite database"),
    ("data.pkl", holding(pickle.dumps([1])), "is a pickle"),
    ("model.safetensors", write_safetensors, "is a safetensors file"),
    ("array.npy", write_array, "is a NumPy array"),
    ("tokens.idx.copy", write_index, "half of a .bin/.idx pair"),
    ("data.zst", holding(b"\x28\xb5\x2f\xfd\x04\0abc"), "is a zstd file.*zstd -d"),
    ("a.pdf", holding(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj"), "is a PDF document"),
    (
        "a.txt",
        holding(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "is Git LFS's pointer to a file.*git lfs pull --include",
    ),
    ("a.png", holding(b"\x89PNG\r\n\x1a\n\0"), "is a PNG image"),
    ("a.jpg", holding(b"\xff\xd8\xff\xe0\0\x10JFIF"), "is a JPEG image"),
    ("utf16.txt", holding("text".encode("utf-16")), "is text in UTF-16.*iconv -f UTF-16"),
    ("latin1.txt", holding(b"a\nGr\xfc\xdfe\n"), "byte 4, in line 2, is 0xFC .*iconv -f latin1"),
    ("zeros.txt", holding(b"a\nb\0"), "byte 3, in line 2, is NUL"),
    ("some.gz", holding(gzip.compress(b"a\nb\0")), "byte 3, in line 2, is NUL"),
    ("library.so", holding(Path(sys.executable).resolve().read_bytes()[:999]), "is a program"),
]


@pytest.mark.parametrize(("name", "write", "complaint"), KINDS, ids=[kind[0] for kind in KINDS])
def test_a_named_file_that_is_not_text_is_rejected_by_its_kind(
    name: str, write: Callable[[Path], object], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    [problem] = GPTDatasetConfig(path=str(path)).problems(container(GPTDatasetConfig()))
    assert problem.startswith(f"dataset.path='{path}': is ")
    assert re.search(complaint, problem)
    with pytest.raises(ValueError, match=f"dataset.test_path=.*{complaint}"):
        find_rows(str(path), "dataset.test_path", KEYS)


def test_the_first_wrong_byte_is_found_far_within_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 500_000 + b"\xc3")
    assert check_text(path) is None  # only cut off
    path.write_bytes(b"line\n" * 500_000 + b"ab\xe9!" + b"line\n" * 500_000)
    with pytest.raises(ValueError, match=r"a.txt: is not text in UTF-8 .byte 2500002, in line 500"):
        list(read_text_documents(find_source(str(path)).files))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32"])
def test_text_of_another_encoding_is_read_after_the_command_that_is_advised(
    encoding: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("needs iconv")
    monkeypatch.chdir(tmp_path)
    raw = (json.dumps({"text": "Grüße"}, ensure_ascii=False) + "\n").encode(encoding)
    path = tmp_path / ("it's a file.jsonl" + ".gz" * packed)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(ValueError, match="iconv") as error:
        find_source(str(path))
    subprocess.run(re.split(r"as with: |of it: ", str(error.value))[-1], shell=True, check=True)
    made = find_source("it's a file-utf8.jsonl")
    assert list(read_text_documents(made.files)) == ["Grüße".encode()]


@pytest.mark.parametrize("chunk", range(1, 9))
def test_a_character_across_two_chunks_is_text(
    chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(file_kinds, "_CHUNK_BYTES", chunk)
    path, text = tmp_path / "a.txt", "ab\né€😀".encode()
    for content, found in ((text, None), (text + b"\xe9abc", 12), (text + b"\0\xe9", 12)):
        path.write_bytes(content)
        with path.open("rb") as stream:
            wrong = file_kinds.first_wrong_byte(stream)
        assert (wrong.offset, wrong.line) == (found, 2) if wrong else found is None


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed_text_is_read(suffix: str, compress: Any, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{n}", **ROW, "id": n}) + "\n" for n in range(3))
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(lines.encode()))
    (tmp_path / f"b.json.{suffix}").write_bytes(compress(lines.encode()))
    (tmp_path / f"c.txt.{suffix}").write_bytes(compress(TEXT.encode()))
    documents = list(read_text_documents(find_source(str(tmp_path)).files))
    assert documents[:6] == [b"0", b"1", b"2"] * 2
    assert b"".join(documents[6:]).decode() == TEXT
    assert len(documents) > 10
    rows = find_rows(str(tmp_path / f"a.jsonl.{suffix}"), "dataset.path", KEYS)["train"]
    assert len(list(rows.conversations())) == 3
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(lines.encode() * 999)[:-20])
    with pytest.raises(ValueError, match=rf"a.jsonl.{suffix}: is an? .* cannot be decompressed"):
        list(read_text_documents(find_source(str(tmp_path)).files))


def test_a_json_file_is_read_line_by_line_or_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(read_text_documents(find_source(str(path)).files)) == [b"one", b"two"]
    assert list(read_text_documents(find_source(str(tmp_path)).files)) == [b"one", b"two"]
    path.write_text(json.dumps([ROW, ROW], indent=1))
    with pytest.raises(ValueError, match="is JSON and not JSON Lines.*jq -c"):
        find_source(str(path))
    # In a directory of sources, such a file is text like any other.
    assert b"".join(read_text_documents(find_source(str(tmp_path)).files)) == path.read_bytes()
    rows = find_rows(str(path), "dataset.path", KEYS)["train"]
    assert [row.place for row in rows.conversations()] == [f"{path}, item {n}" for n in (1, 2)]
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"rows.json, item 1: expected an object with keys, got 1"):
        list(find_rows(str(path), "dataset.path", KEYS)["train"].conversations())


def test_a_lone_token_file_is_reported_also_next_to_complete_pairs(tmp_path: Path) -> None:
    write_pair(tmp_path / "whole", [[1, 2]])
    write_pair(tmp_path / "half", [[1, 2]])
    (tmp_path / "half.idx").unlink()
    for entry in (tmp_path / "half", tmp_path / "half.bin", tmp_path, tmp_path / "*"):
        with pytest.raises(ValueError, match=r"half\.idx missing; token files come in pairs"):
            find_source(str(entry))


def test_files_of_a_directory_that_are_not_read_are_named_at_every_start(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_story(folder / "story.txt", 500)
    for number in range(5):
        (folder / f"{number}.png").write_bytes(b"\x89PNG\0")
    dataset = GPTDatasetConfig(path=str(folder), cache_dir=str(tmp_path / "cache"))
    for _ in ("anew", "from the cache"):
        [line] = build_splits(dataset, train=4).warnings
        assert line.startswith(
            f"warning: train data: 5 files are not text and skipped: {folder}/0.png (a PNG image), "
        )
        assert line.endswith("2.png (a PNG image) and 2 more")
    (folder / "story.txt").unlink()
    with pytest.raises(ValueError, match="the files hold no text: 5 files are not text and skip"):
        build_splits(dataset, train=4)


def run_conversion(message: str) -> None:
    """Run the command that a message advises."""
    found = re.search(r'python -c "(.*)"', message)
    assert found is not None, message
    exec(found[1], {})


@pytest.mark.xdist_group("datasets")
@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow", "one split", "splits"])
def test_tables_are_rejected_with_a_command_that_makes_json_lines_of_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list([{"text": "eins ü", "id": 1}, {"text": "zwei", "id": 2}])
    folder = tmp_path / "saved"
    folder.mkdir()
    named = folder / f"rows.{kind}"
    if kind == "parquet":
        rows.to_parquet(str(named))
    elif kind == "feather":
        rows.to_pandas().to_feather(named)
    elif kind == "splits":
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder))
    else:
        rows.save_to_disk(str(folder))
    if kind == "arrow":
        (folder / "state.json").unlink()
        named = folder / "data-00000-of-00001.arrow"
    # Next to a text, which alone would otherwise be trained on.
    (folder / "README.md").write_text("about it")
    entries = [folder] if "split" in kind else [folder, named]
    for entry in entries:
        with pytest.raises(ValueError, match="dataset.path='.*': .*convert it") as error:
            list(read_text_documents(find_source(str(entry)).files))
    run_conversion(str(error.value))
    [made] = tmp_path.glob("*.jsonl")
    documents = list(read_text_documents(find_source(str(made)).files))
    assert documents == ["eins ü".encode(), b"zwei"]
