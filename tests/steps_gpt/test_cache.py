"""The cache of tokens: complete folders alone, used again, shared by ranks."""

import os
import threading
from pathlib import Path

import pytest

from bridge.gpt.data.cache import default_cache_dir, published, published_by_first_rank
from bridge.gpt.data.pretraining.corpora import cached_tokens
from bridge.gpt.data.text.sources import find_source
from bridge.training.config import TokenizerConfig
from bridge.training.ranks.collectives import on_first_rank
from gpt_data import read_pair, tree, write_story
from ranks import run_ranks


def text_of(prefix: str | Path) -> bytes:
    return b"".join(bytes(document[:-1]) for document in read_pair(prefix))


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


def test_a_failed_block_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    files = find_source(str(write_story(tmp_path / "story.txt"))).files
    cache = tmp_path / "cache"

    def build_and_refuse() -> None:
        with cached_tokens(files, TokenizerConfig(), cache) as cached:
            assert len(read_pair(cached.readable_prefix)) > 10
            raise ValueError("too short")

    with pytest.raises(ValueError, match="too short"):
        build_and_refuse()
    assert tree(cache) == ["tokens"]


def test_two_simultaneous_builds_both_get_the_same_folder(tmp_path: Path) -> None:
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


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"dataset\.cache_dir=DIR"):
        with published(tmp_path / "file" / "key"):
            pass


def test_the_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/bridge/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "bridge" / "data"


def test_a_shared_directory_appears_when_every_rank_is_done(tmp_path: Path) -> None:
    def rank() -> tuple[bool, list[str]]:
        with published_by_first_rank(tmp_path / "key") as directory:
            on_first_rank(lambda: (directory / "file").write_text("x"))
            seen = (directory / "file").exists() and not (tmp_path / "key").exists()
        on_first_rank(lambda: None)
        return seen, tree(tmp_path)

    assert run_ranks(2, rank) == [(True, ["key", "key/file"])] * 2
