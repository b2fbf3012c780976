import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.gpt.data.cache import default_cache_dir, published, published_by_first_rank
from bridge.gpt.data.corpora import cached_tokens
from bridge.gpt.data.text.documents import read_documents
from bridge.gpt.data.text.sources import find_source
from bridge.gpt.data.token_files import build_token_files, write_tokens
from bridge.gpt.data.tokenization.tokenizers import ByteTokenizer
from bridge.training.config import TokenizerConfig
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.usage_error import UsageError
from gpt_data import read_pair, tree, write_story
from ranks import RankFailure, run_ranks
from small_disks import small_disk


def text_of(prefix: str | Path) -> bytes:
    return b"".join(bytes(document[:-1]) for document in read_pair(prefix))


def test_tokens_read_back_are_the_text_with_an_end_after_each_document(tmp_path: Path) -> None:
    story = write_story(tmp_path / "story.txt")
    files = find_source(str(story)).files
    counts = build_token_files(files, ByteTokenizer(), str(tmp_path / "out"))

    documents = list(read_documents(files))
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


class _FailsInTheMiddle(ByteTokenizer):
    @property
    def eod(self) -> int:
        raise OSError("disk full")


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    files = find_source(str(write_story(tmp_path / "story.txt"))).files
    with pytest.raises(OSError, match="disk full"):
        build_token_files(files, _FailsInTheMiddle(), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no text"):
        write_tokens([], ByteTokenizer(), str(tmp_path / "story.none"))
    (tmp_path / "story.none.bin").unlink()
    assert tree(tmp_path) == ["story.txt"]


def test_the_cache_is_used_again_until_a_file_or_the_tokenizer_changes(tmp_path: Path) -> None:
    story, cache = write_story(tmp_path / "story.txt"), tmp_path / "cache"

    def prefix(tokenizer: TokenizerConfig) -> str:
        with cached_tokens(find_source(str(story)).files, tokenizer, cache) as cached:
            pass
        return cached.prefix

    first = prefix(TokenizerConfig())
    built = os.stat(f"{first}.bin").st_mtime_ns
    assert prefix(TokenizerConfig()) == first
    assert os.stat(f"{first}.bin").st_mtime_ns == built
    story.write_text(story.read_text().replace("Paragraph 7", "paragraph 7"))
    os.utime(story, ns=(1, 1))
    second = prefix(TokenizerConfig())
    assert second != first
    assert text_of(second) == story.read_bytes() != text_of(first)


def test_what_fails_inside_the_block_enters_no_cache(tmp_path: Path) -> None:
    files = find_source(str(write_story(tmp_path / "story.txt"))).files
    cache = tmp_path / "cache"

    def build_and_refuse() -> None:
        with cached_tokens(files, TokenizerConfig(), cache) as cached:
            assert len(read_pair(cached.readable_prefix)) > 10
            raise ValueError("too short")

    with pytest.raises(ValueError, match="too short"):
        build_and_refuse()
    assert tree(cache) == ["tokens"]


def test_two_that_build_the_same_at_once_both_end_with_it(tmp_path: Path) -> None:
    final = tmp_path / "cache" / "key"
    both_started = threading.Barrier(2)
    contents = []

    def build(name: str) -> None:
        with published(final) as directory:
            both_started.wait(timeout=20)
            (directory / "file").write_text(name)
        contents.append((final / "file").read_text())

    threads = [threading.Thread(target=build, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(contents) == 2
    assert len(set(contents)) == 1
    assert tree(tmp_path / "cache") == ["key", "key/file"]


class _IsKilled(ByteTokenizer):
    @property
    def eod(self) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def killed(body: Callable[[], object]) -> None:
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(1, body, process_group=False)


def made_long_ago(place: Path) -> None:
    long_ago = time.time() - 10
    for partial in place.glob(".*.partial-*"):
        os.utime(partial, (long_ago, long_ago))


def test_what_a_killed_build_left_is_removed_by_the_next_and_a_running_one_is_left_alone(
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
    killed(in_cache)
    killed(lambda: build_token_files(files, _IsKilled(), str(tmp_path / "made" / "out")))
    killed(between_the_halves)
    assert len(tree(tmp_path / "cache")) == 3
    assert "out.bin" in tree(tmp_path / "made")
    for place in (tmp_path / "cache", tmp_path / "made"):
        made_long_ago(place)
    with published(tmp_path / "cache" / "running") as running:
        made_long_ago(tmp_path / "cache")
        with published(tmp_path / "cache" / "other"):
            pass
        assert running.is_dir()
    assert tree(tmp_path / "cache") == [of_another.name, "other", "running"]
    build_token_files(files, ByteTokenizer(), str(tmp_path / "made" / "out"))
    assert tree(tmp_path / "made") == ["out.bin", "out.idx"]


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"dataset\.cache_dir=DIR"):
        with published(tmp_path / "file" / "key"):
            pass


def test_a_full_disk_is_told_and_nothing_is_left_on_it(tmp_path: Path) -> None:
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


def test_the_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/bridge/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "bridge" / "data"


class Unusual(Exception):
    """Takes two arguments and tells its base class of one: pickle cannot make it again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (ValueError("seven"), "ValueError"),
        (UsageError("dataset.path: seven"), "UsageError"),
        (Unusual(6, 7), "RuntimeError"),
    ],
)
def test_rank_zero_works_for_all_and_its_exception_reaches_all(
    error: Exception, elsewhere: str
) -> None:
    def rank() -> tuple[int, str, str]:
        agreed = on_first_rank(os.getpid)
        try:
            on_first_rank(lambda: fail_with(error))
        except Exception as found:
            return agreed, type(found).__name__, "".join(traceback.format_exception(found))
        return agreed, "no error", ""

    (agreed, first, _), (same, second, trace) = run_ranks(2, rank)
    assert agreed == same
    assert (first, second) == (type(error).__name__, elsewhere)
    # The traceback on another rank leads to the line on rank 0.
    assert "raised on rank 0:" in trace
    assert "in fail_with" in trace
    assert str(error) in trace


def test_a_shared_directory_appears_when_every_rank_is_done(tmp_path: Path) -> None:
    def rank() -> tuple[bool, list[str]]:
        with published_by_first_rank(tmp_path / "key") as directory:
            on_first_rank(lambda: (directory / "file").write_text("x"))
            seen = (directory / "file").exists() and not (tmp_path / "key").exists()
        on_first_rank(lambda: None)
        return seen, tree(tmp_path)

    assert run_ranks(2, rank) == [(True, ["key", "key/file"])] * 2
