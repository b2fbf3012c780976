import json
import sysconfig
from pathlib import Path

import pytest

from bridge.gpt.data.text.documents import (
    LARGEST_TARGET_BYTES,
    SMALLEST_TARGET_BYTES,
    cut_text,
    read_text_documents,
    target_bytes,
)
from bridge.gpt.data.text.sources import find_source, python_standard_library


def names(source: object) -> list[str]:
    return [file.path.name for file in source.files]  # type: ignore[attr-defined]


def test_one_file_a_directory_and_a_glob_are_found_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", ".hidden", "__pycache__/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")

    assert names(find_source(str(tmp_path / "b.txt"))) == ["b.txt"]
    assert names(find_source(str(tmp_path))) == ["a.md", "b.txt", "c.txt"]
    assert names(find_source(str(tmp_path / "*.txt"))) == ["b.txt"]
    assert names(find_source(str(tmp_path / "**/*.txt"))) == ["x.txt", "b.txt", "c.txt"]
    assert find_source(str(tmp_path / "**")).not_read == ()


def test_a_directory_is_read_once_even_through_links(tmp_path: Path) -> None:
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("text")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "deep" / "round").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "gone").symlink_to(tmp_path / "nowhere")
    assert names(find_source(str(tmp_path / "texts"))) == ["a.txt"]


def test_folders_that_a_glob_matches_are_not_read_and_named(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError, match="no file is there .1 folder is not read: .*/deep, match"):
        find_source(str(tmp_path / "*"))
    (tmp_path / "a.txt").write_text("text")
    [line] = find_source(str(tmp_path / "*")).not_read
    assert line.startswith(f"1 folder is not read: {tmp_path}/deep, matched by '{tmp_path}/*'")


def test_token_files_are_found_by_prefix_by_either_file_and_in_a_directory(
    tmp_path: Path,
) -> None:
    prefix = tmp_path / "corpus.v1"
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").write_bytes(b"x")
    (tmp_path / "README.md").write_text("how it was made")

    for entry in (prefix, f"{prefix}.bin", f"{prefix}.idx", tmp_path, tmp_path / "*"):
        source = find_source(str(entry))
        assert source.prefixes == (str(prefix),)
        assert source.files == ()
        is_folder = entry in (tmp_path, tmp_path / "*")
        assert [line.partition(",")[0] for line in source.not_read] == (
            [f"1 file is not read: {tmp_path}/README.md"] if is_folder else []
        )


def test_a_lone_token_file_is_an_error_that_names_the_other(tmp_path: Path) -> None:
    (tmp_path / "corpus.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"corpus\.idx missing"):
        find_source(str(tmp_path / "corpus.bin"))


@pytest.mark.parametrize("entry", ["missing.txt", "*.nothing", ""])
def test_a_missing_path_is_an_error_with_field_value_and_remedy(entry: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^dataset\.path.*give") as error:
        find_source(str(tmp_path / entry) if entry else entry)
    assert entry in str(error.value)


def test_empty_files_are_an_error_only_if_all_are_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for entry in (tmp_path / "empty.txt", tmp_path):
        with pytest.raises(ValueError, match="empty"):
            find_source(str(entry))
    (tmp_path / "full.txt").write_text("text")
    assert list(read_text_documents(find_source(str(tmp_path)).files)) == [b"text"]


def test_files_of_a_directory_that_are_not_text_are_skipped_and_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "old.txt").write_bytes("Grüße".encode("latin1"))
    (tmp_path / "raw").write_bytes(b"x" * 10_000_000 + b"\0")
    (tmp_path / "story.txt").write_text("text")
    skipped: list[str] = []
    documents = list(read_text_documents(find_source(str(tmp_path)).files, skipped=skipped))
    assert documents == [b"text"]
    assert skipped == [
        f"{tmp_path}/image.png (a PNG image)",
        f"{tmp_path}/old.txt (not UTF-8)",
        f"{tmp_path}/raw (binary data)",
    ]


def test_a_large_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = b"".join(b"line %d\nmore\n \r\n" % n for n in range(1000))
    pieces = list(cut_text(text, 300))
    assert b"".join(pieces) == text
    assert len(pieces) > 30
    assert all(piece.endswith(b"\n \r\n") for piece in pieces)
    assert all(300 <= len(piece) < 600 for piece in pieces[:-1])


def test_text_without_blank_lines_is_cut_at_line_ends_or_between_characters() -> None:
    lines = b"".join(b"line %d\n" % n for n in range(1000))
    pieces = list(cut_text(lines, 300))
    assert b"".join(pieces) == lines
    assert all(piece.endswith(b"\n") for piece in pieces)

    unbroken = ("\u20ac" * 5000).encode()
    pieces = list(cut_text(unbroken, 500))
    assert b"".join(pieces) == unbroken
    assert {piece.decode().strip("\u20ac") for piece in pieces} == {""}

    assert b"".join(cut_text(b"\x80" * 5000, 500)) == b"\x80" * 5000


def test_small_corpora_are_cut_finer_so_that_one_percent_is_a_document() -> None:
    assert target_bytes(10_000) == SMALLEST_TARGET_BYTES
    assert target_bytes(1_000_000) == 5000
    assert target_bytes(10**9) == LARGEST_TARGET_BYTES


def test_each_line_of_json_lines_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    texts = ["first", "long " * 10_000, "\u00e9\u20ac"]
    path.write_text("\n\n".join(json.dumps({"text": text}) for text in [*texts, ""]))
    documents = list(read_text_documents(find_source(str(path)).files))
    assert documents == [text.encode() for text in texts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"}', r"line 2: no text under the key 'text' \(there is: content\).*json"),
        ('{"text": 3}', "line 2: no text under the key 'text'"),
        ('["x"]', "line 2: no text under the key 'text', since it is no object; write an object"),
        ('{"text": null}', "line 2: no text under the key 'text' .*; write a text there, or take"),
        ('{"text": ', r"line 2: not JSON \(.*, at character 11\); write an object a line"),
        pytest.param("[" * 100_000, "line 2: not JSON .*; write an object a line", id="deep"),
    ],
)
def test_a_wrong_line_of_json_lines_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list(read_text_documents(find_source(str(path)).files))


def test_the_standard_library_is_sorted_real_source_without_installed_packages() -> None:
    files = python_standard_library().files
    paths = [file.path for file in files]
    assert paths == sorted(paths)
    assert Path(sysconfig.get_path("stdlib")).resolve() / "argparse.py" in paths
    assert not {"site-packages", "dist-packages", "test", "__pycache__"} & {
        part for path in paths for part in path.parts
    }
    assert sum(file.size for file in files) > 5_000_000
