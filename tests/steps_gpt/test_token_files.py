"""Token files: their contents, and builds that fail or are killed."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import override

import pytest

from bridge.gpt.data.cache import published
from bridge.gpt.data.pretraining.corpora import cached_tokens
from bridge.gpt.data.text.documents import read_text_documents
from bridge.gpt.data.text.sources import find_source
from bridge.gpt.data.token_files import build_token_files, write_tokens
from bridge.gpt.data.tokenization.tokenizers import ByteTokenizer
from bridge.training.config import TokenizerConfig
from bridge.training.usage_error import UsageError
from gpt_data import read_pair, tree, write_story
from ranks import RankFailure, run_ranks
from small_disks import small_disk


def text_of(prefix: str | Path) -> bytes:
    return b"".join(bytes(document[:-1]) for document in read_pair(prefix))


def test_token_files_hold_the_text_with_an_end_after_each_document(tmp_path: Path) -> None:
    story = write_story(tmp_path / "story.txt")
    files = find_source(str(story)).files
    counts = build_token_files(files, ByteTokenizer(), str(tmp_path / "out"))

    documents = list(read_text_documents(files))
    assert len(documents) > 10
    assert read_pair(tmp_path / "out") == [[*document, 256] for document in documents]
    assert counts.documents == len(documents)
    assert counts.tokens == story.stat().st_size + len(documents)
    assert (tmp_path / "out.bin").stat().st_size == 2 * counts.tokens
    assert text_of(tmp_path / "out") == story.read_bytes()
    assert tree(tmp_path) == ["out.bin", "out.idx", "story.txt"]


@pytest.mark.parametrize("half", ["out.bin", "out.idx"])
def test_files_that_exist_are_never_overwritten(half: str, tmp_path: Path) -> None:
    files = find_source(str(write_story(tmp_path / "story.txt"))).files
    (tmp_path / half).write_text("precious")
    with pytest.raises(ValueError, match="exist and are not overwritten"):
        build_token_files(files, ByteTokenizer(), str(tmp_path / "out"))
    assert (tmp_path / half).read_text() == "precious"
    assert tree(tmp_path) == sorted([half, "story.txt"])


class FailingTokenizer(ByteTokenizer):
    @property
    @override
    def eod(self) -> int:
        raise OSError("disk full")


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    files = find_source(str(write_story(tmp_path / "story.txt"))).files
    with pytest.raises(OSError, match="disk full"):
        build_token_files(files, FailingTokenizer(), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no text"):
        write_tokens([], ByteTokenizer(), str(tmp_path / "story.none"))
    (tmp_path / "story.none.bin").unlink()
    assert tree(tmp_path) == ["story.txt"]


class KilledTokenizer(ByteTokenizer):
    @property
    @override
    def eod(self) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def assert_killed(body: Callable[[], object]) -> None:
    with pytest.raises(RankFailure, match="died without a report"):
        run_ranks(1, body, process_group=False)


def make_old(place: Path) -> None:
    long_ago = time.time() - 10
    for partial in place.glob(".*.partial-*"):
        os.utime(partial, (long_ago, long_ago))


def test_the_remains_of_a_killed_build_are_removed_by_the_next_and_a_running_build_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_source(str(write_story(tmp_path / "story.txt"))).files
    for place in (tmp_path / "cache", tmp_path / "made"):
        place.mkdir()

    def in_cache() -> None:
        with published(tmp_path / "cache" / "key") as directory:
            (directory / "file").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def between_the_halves() -> None:
        link = os.link

        def dying_link(source: Path, target: Path) -> None:
            link(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(os, "link", dying_link)
        build_token_files(files, ByteTokenizer(), str(tmp_path / "made" / "out"))

    of_another = tmp_path / "cache" / ".theirs.partial-1"
    of_another.mkdir()
    assert_killed(in_cache)
    assert_killed(
        lambda: build_token_files(files, KilledTokenizer(), str(tmp_path / "made" / "out"))
    )
    assert_killed(between_the_halves)
    assert len(tree(tmp_path / "cache")) == 3
    assert "out.bin" in tree(tmp_path / "made")
    for place in (tmp_path / "cache", tmp_path / "made"):
        make_old(place)
    with published(tmp_path / "cache" / "running") as running:
        make_old(tmp_path / "cache")
        with published(tmp_path / "cache" / "other"):
            pass
        assert running.is_dir()
    assert tree(tmp_path / "cache") == [of_another.name, "other", "running"]
    build_token_files(files, ByteTokenizer(), str(tmp_path / "made" / "out"))
    assert tree(tmp_path / "made") == ["out.bin", "out.idx"]


def test_a_full_disk_is_reported_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    story = write_story(tmp_path / "story.txt")
    story.write_text(story.read_text() * 20)
    files = find_source(str(story)).files
    with small_disk(tmp_path / "disk", 16) as disk:
        with pytest.raises(UsageError, match="No space left.*name another.*dataset.cache_dir=DIR"):
            with cached_tokens(files, TokenizerConfig(), disk / "cache"):
                pass
        assert tree(disk / "cache") == ["tokens"]
        with pytest.raises(UsageError, match="--output=.* cannot be written .No space left"):
            build_token_files(files, ByteTokenizer(), str(disk / "out"))
        assert tree(disk) == ["cache", "cache/tokens"]
