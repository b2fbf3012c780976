import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.training.config import TokenizerConfig
from bridge.training.contracts import ChecksItself, DatasetConfig, SizedDataset, named_sets
from gpt_data import build_splits, container, tree, write_pair, write_story
from ranks import run_ranks


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def story(tmp_path: Path) -> Path:
    return write_story(tmp_path / "story.txt", paragraphs=1000)


def counted(*, documents: int = 40, length: int = 50, first: int = 0) -> list[list[int]]:
    """Return documents whose tokens count up from `first`."""
    return [list(range(first + n * length, first + (n + 1) * length)) for n in range(documents)]


def tokens_of(dataset: SizedDataset | Mapping[str, SizedDataset] | None) -> list[list[int]]:
    assert dataset is not None
    assert not isinstance(dataset, Mapping)
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]


NUMBERS = TokenizerConfig(type="null", vocab_size=100_000)


def test_the_section_is_a_dataset_config_with_checks() -> None:
    assert isinstance(GPTDatasetConfig(), DatasetConfig)
    assert isinstance(GPTDatasetConfig(), ChecksItself)


def test_a_text_file_becomes_next_token_samples(story: Path, cache: str) -> None:
    splits = build_splits(GPTDatasetConfig(path=str(story), cache_dir=cache), train=10)
    assert splits.train is not None
    sample = splits.train[0]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert sample["tokens"].shape == (32,)
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    assert sample["loss_mask"].tolist() == [1.0] * 32
    assert sample["position_ids"].tolist() == list(range(32))
    # 256 is between documents.
    text = bytes(token for token in sample["tokens"].tolist() if token < 256)
    assert text.decode()[:8] in story.read_text()
    assert splits.shuffle is False
    assert splits.notes["train tokens"] + splits.notes["validation tokens"] == (
        story.stat().st_size
        + splits.notes["train documents"]
        + splits.notes["validation documents"]
    )


@pytest.mark.parametrize("kind", ["file", "directory", "glob", "jsonl", "list", "prefix"])
def test_every_kind_of_path_trains_for_two_steps(
    kind: str, story: Path, tmp_path: Path, cache: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_story(folder / "a.txt", 600)
    write_story(folder / "b.txt", 600)
    lines = [json.dumps({"text": part}) for part in story.read_text().split("\n\n")]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    path: str | list[str] = {
        "file": str(story),
        "directory": str(folder),
        "glob": str(folder / "*.txt"),
        "jsonl": str(tmp_path / "lines.jsonl"),
        "prefix": write_pair(tmp_path / "pair", counted(documents=400, length=20, first=0)),
    }.get(kind, "")
    if kind == "list":
        path = [str(story), str(folder / "a.txt")]
    tokenizer = NUMBERS if kind == "prefix" else None
    dataset = GPTDatasetConfig(path=path, cache_dir=cache)
    splits = build_splits(dataset, train=8, tokenizer=tokenizer)
    assert splits.train is not None
    assert splits.validation is not None
    assert len(splits.train) >= 8
    assert len(splits.validation) > 0
    assert list(dataset.problems(container(dataset))) == []


def test_validation_is_exactly_one_pass_over_its_documents(tmp_path: Path, cache: str) -> None:
    documents = counted(documents=40, length=50)
    prefix = write_pair(tmp_path / "pair", documents)
    dataset = GPTDatasetConfig(path=prefix, split="90,10", cache_dir=cache)
    for asked in (None, 3, 1000):
        splits = build_splits(dataset, train=5, validation=asked, tokenizer=NUMBERS, seq_length=30)
        tokens = tokens_of(splits.validation)
        assert len(tokens) == (4 * 50 - 1) // 30
        seen = Counter(token for sample in tokens for token in sample)
        assert set(seen.values()) == {1}
        assert set(seen) <= set(range(36 * 50, 40 * 50))
        assert splits.test is None
    assert max(max(sample) for sample in tokens_of(splits.train)) < 36 * 50


def test_training_repeats_passes_as_often_as_the_run_needs(tmp_path: Path, cache: str) -> None:
    prefix = write_pair(tmp_path / "pair", counted(documents=20, length=50))
    dataset = GPTDatasetConfig(path=prefix, split="1,0,0", cache_dir=cache)
    one_pass = build_splits(dataset, tokenizer=NUMBERS)
    assert one_pass.train is not None
    assert len(one_pass.train) == (1000 - 1) // 32
    assert one_pass.shuffle is True
    assert one_pass.validation is None
    many = build_splits(dataset, train=100, tokenizer=NUMBERS)
    assert many.train is not None
    assert len(many.train) >= 100
    assert many.shuffle is False


def test_the_order_follows_the_seed_and_not_how_much_is_drawn(story: Path, cache: str) -> None:
    def order(train: int, seed: int) -> tuple[list[list[int]], str | None]:
        splits = build_splits(
            GPTDatasetConfig(path=str(story), cache_dir=cache), train=train, seed=seed
        )
        return tokens_of(splits.train)[:20], splits.fingerprint

    assert order(20, seed=1) == order(100, seed=1)
    assert order(20, seed=1)[0] != order(20, seed=2)[0]
    assert order(20, seed=1)[1] != order(20, seed=2)[1]
    # Past one pass megatron-core's order depends on how much is drawn.
    assert order(20, seed=1)[1] != order(5000, seed=1)[1]


def test_weights_are_shares_of_the_training_samples(tmp_path: Path, cache: str) -> None:
    small = write_pair(tmp_path / "small", counted(documents=40, length=50))
    large = write_pair(tmp_path / "large", counted(documents=400, length=50, first=50_000))
    dataset = GPTDatasetConfig(
        path=[small, large], weights=[3.0, 1.0], split="90,10", cache_dir=cache
    )
    splits = build_splits(dataset, train=80, tokenizer=NUMBERS)
    from_small = [max(sample) < 50_000 for sample in tokens_of(splits.train)[:80]]
    assert sum(from_small) == pytest.approx(60, abs=2)
    assert len(tokens_of(splits.validation)) == (4 * 50 - 1) // 32 + (40 * 50 - 1) // 32


def test_a_blend_without_weights_draws_corpora_by_their_size(tmp_path: Path, cache: str) -> None:
    small = write_pair(tmp_path / "small", counted(documents=20, length=50))
    large = write_pair(tmp_path / "large", counted(documents=60, length=50, first=50_000))
    dataset = GPTDatasetConfig(path=[small, large], split="1", cache_dir=cache)
    once = build_splits(dataset, tokenizer=NUMBERS)
    assert len(tokens_of(once.train)) == (1000 - 1) // 32 + (3000 - 1) // 32
    for wanted in (2, 500):
        splits = build_splits(dataset, train=wanted, tokenizer=NUMBERS)
        tokens = tokens_of(splits.train)
        assert len(tokens) >= wanted
    from_small = [max(sample) < 50_000 for sample in tokens]
    assert sum(from_small) / len(from_small) == pytest.approx(0.25, abs=0.02)


def test_validation_and_test_may_have_their_own_paths(tmp_path: Path, cache: str) -> None:
    paths = {
        name: write_pair(tmp_path / name, counted(documents=4, length=50, first=first))
        for name, first in (("train", 0), ("valid", 1000), ("test", 2000))
    }
    dataset = GPTDatasetConfig(
        path=paths["train"],
        validation_path=paths["valid"],
        test_path=paths["test"],
        cache_dir=cache,
    )
    splits = build_splits(dataset, tokenizer=NUMBERS)
    for built, first in ((splits.train, 0), (splits.validation, 1000), (splits.test, 2000)):
        tokens = tokens_of(built)
        assert len(tokens) == (200 - 1) // 32
        assert {token // 1000 for sample in tokens for token in sample} == {first // 1000}


def test_evaluation_that_is_off_needs_no_validation_data(tmp_path: Path, cache: str) -> None:
    prefix = write_pair(tmp_path / "pair", counted(documents=2, length=50))
    dataset = GPTDatasetConfig(path=prefix, cache_dir=cache)
    assert build_splits(dataset, validation=0, tokenizer=NUMBERS).validation is None


@pytest.mark.parametrize(
    ("characters", "share"), [(6_000, 0.3), (20_000, 0.1), (100_000, 0.02), (500_000, 0.02)]
)
def test_the_default_split_of_a_small_text_has_a_larger_validation_share(
    characters: int, share: float, tmp_path: Path, cache: str
) -> None:
    (tmp_path / "a.txt").write_text("hello world\n" * (characters // 12))
    dataset = GPTDatasetConfig(path=str(tmp_path / "a.txt"), cache_dir=cache)
    notes = build_splits(dataset, train=4, seq_length=100, global_batch_size=16).notes
    tokens = notes["train tokens"] + notes["validation tokens"]
    assert notes["validation tokens"] / tokens == pytest.approx(share, rel=0.3)
    assert notes["validation tokens"] > 1600


@pytest.mark.timeout(60)
def test_an_empty_split_is_an_error_that_names_a_split_that_works(
    tmp_path: Path, cache: str
) -> None:
    prefix = write_pair(tmp_path / "pair", counted(documents=20, length=50))
    dataset = GPTDatasetConfig(path=prefix, split="99,1,0", cache_dir=cache)
    with pytest.raises(ValueError, match=r"^dataset\.split='99,1,0'.* 0 of 20 documents") as error:
        build_splits(dataset, train=100, tokenizer=NUMBERS)
    assert "dataset.split=95,5,0" in str(error.value)
    assert "validation.eval_iters=0" in str(error.value)
    dataset.split = "95,5,0"
    splits = build_splits(dataset, train=100, tokenizer=NUMBERS)
    assert len(tokens_of(splits.validation)) == (50 - 1) // 32


@pytest.mark.timeout(60)
def test_a_sequence_longer_than_the_data_is_an_error_and_leaves_nothing(
    story: Path, cache: str
) -> None:
    dataset = GPTDatasetConfig(path=str(story), cache_dir=cache)
    with pytest.raises(ValueError, match=r"^model\.seq_length=1000000: .*tokens in all"):
        build_splits(dataset, train=4, seq_length=1_000_000)
    with pytest.raises(ValueError, match=r"^dataset\.split"):
        build_splits(dataset, train=4, seq_length=story.stat().st_size // 2)
    assert [name for name in tree(Path(cache)) if "/" in name] == []


def test_changed_data_of_the_same_name_is_indexed_anew(tmp_path: Path, cache: str) -> None:
    dataset = GPTDatasetConfig(path=str(tmp_path / "pair"), split="1", cache_dir=cache)
    write_pair(tmp_path / "pair", counted(documents=20, length=50))
    before = build_splits(dataset, tokenizer=NUMBERS)
    assert len(tokens_of(before.train)) == 31
    write_pair(tmp_path / "pair", counted(documents=10, length=70))
    after = build_splits(dataset, tokenizer=NUMBERS)
    assert sorted(min(sample) // 700 for sample in tokens_of(after.train)) == [0] * 21


def test_the_cache_holds_only_complete_folders(story: Path, cache: str) -> None:
    dataset = GPTDatasetConfig(path=str(story), cache_dir=cache)
    build_splits(dataset, train=4)
    built = tree(Path(cache))
    assert not any(".partial-" in name for name in built)
    modified = {name: os.stat(Path(cache, name)).st_mtime_ns for name in built}
    build_splits(dataset, train=5)
    assert {name: os.stat(Path(cache, name)).st_mtime_ns for name in tree(Path(cache))} == modified


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: Path(f"{prefix}.idx").write_bytes(b"not an index"), "not an index"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 100), "cut short"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 0), "is empty"),
    ],
)
def test_damaged_token_files_are_errors(
    damage: Any, message: str, tmp_path: Path, cache: str
) -> None:
    prefix = write_pair(tmp_path / "pair", counted())
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        build_splits(GPTDatasetConfig(path=prefix, cache_dir=cache), tokenizer=NUMBERS)


def test_tokens_outside_the_vocabulary_are_an_error(tmp_path: Path, cache: str) -> None:
    prefix = write_pair(tmp_path / "pair", counted())
    with pytest.raises(ValueError, match=r"token 1999, and the tokenizer has 257.*tokenizer\.type"):
        build_splits(GPTDatasetConfig(path=prefix, cache_dir=cache))


def test_text_with_the_null_tokenizer_is_an_error(story: Path, cache: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.type=bytes"):
        build_splits(GPTDatasetConfig(path=str(story), cache_dir=cache), tokenizer=NUMBERS)


def test_positions_and_the_loss_mask_follow_the_ends_of_documents(
    tmp_path: Path, cache: str
) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "abc"}\n' * 100)
    dataset = GPTDatasetConfig(
        path=str(tmp_path / "lines.jsonl"),
        split="1",
        reset_position_ids=True,
        eod_mask_loss=True,
        cache_dir=cache,
    )
    splits = build_splits(dataset, train=1, seq_length=8)
    assert splits.train is not None
    sample = splits.train[0]
    tokens = sample["tokens"].tolist()
    assert sample["loss_mask"].tolist() == [float(token != 256) for token in tokens]
    start = tokens.index(256) + 1
    assert sample["position_ids"].tolist()[start : start + 4] == [0, 1, 2, 3]


def test_the_path_takes_precedence_over_the_standard_library(story: Path, cache: str) -> None:
    dataset = GPTDatasetConfig(path=str(story), standard_library=True, cache_dir=cache)
    assert build_splits(dataset).notes["train tokens"] < 100_000


def test_the_standard_library_needs_no_path(cache: str) -> None:
    dataset = GPTDatasetConfig(standard_library=True, cache_dir=cache)
    splits = build_splits(dataset, train=10)
    assert splits.notes["train tokens"] > 5_000_000
    assert b"def " in bytes(t for s in tokens_of(splits.validation) for t in s if t < 256)


def test_mock_samples_are_random_tokens_fixed_by_seed_and_index() -> None:
    def mock(train: int, seed: int = 1) -> list[list[int]]:
        dataset = GPTDatasetConfig(mock=True, standard_library=True)
        settings: dict[str, Any] = {"tokenizer": NUMBERS, "seq_length": 128, "seed": seed}
        return tokens_of(build_splits(dataset, train=train, **settings).train)

    tokens = mock(50)
    assert len(tokens) == 50
    assert tokens == mock(60)[:50]
    assert tokens != mock(50, seed=2)
    assert np.mean(tokens) == pytest.approx(50_000, rel=0.05)
    splits = build_splits(GPTDatasetConfig(mock=True), validation=5, test=0, tokenizer=NUMBERS)
    assert splits.test is None
    assert len(tokens_of(splits.validation)) == 5
    sample: Any = next(iter(named_sets("validation", splits.validation).values()))[0]
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()


def problems_of(dataset: GPTDatasetConfig, **settings: Any) -> str:
    return "\n".join(dataset.problems(container(dataset, **settings)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "dataset.path: nothing to train on"),
        ({"path": "absent.txt"}, "dataset.path='absent.txt': there is no such"),
        ({"path": "{story}", "test_path": "absent"}, "dataset.test_path='absent'"),
        ({"path": "{story}", "mock": True}, "dataset.mock=true and dataset.path"),
        ({"path": ["{story}", "{story}"], "weights": [1.0]}, "1 weights for 2 paths"),
        ({"path": ["{story}"], "weights": [-1.0]}, "dataset.weights=[-1.0]"),
        ({"path": "{story}", "split": "0,1"}, "dataset.split='0,1'"),
        ({"path": "{story}", "split": "99;1"}, "dataset.split='99;1'"),
        ({"path": "{story}", "split": "1,1,1,1"}, "dataset.split='1,1,1,1'"),
        ({"path": "{story}", "split": "1,-1"}, "dataset.split='1,-1'"),
        ({"path": "{story}", "seq_length": 16}, "dataset.seq_length=16 and model.seq_length=32"),
        ({"path": "{story}", "num_dataset_builder_threads": 0}, "num_dataset_builder_threads=0"),
    ],
)
def test_contradictions_are_reported_before_anything_is_built(
    settings: dict[str, Any], message: str, story: Path, tmp_path: Path
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return value.replace("{story}", str(story)) if isinstance(value, str) else value

    dataset = GPTDatasetConfig(
        **{key: filled(value) for key, value in settings.items()},
        cache_dir=str(tmp_path / "cache"),
    )
    assert message in problems_of(dataset)
    assert tree(tmp_path) == ["story.txt"]


def test_all_contradictions_are_reported_at_once(story: Path) -> None:
    dataset = GPTDatasetConfig(path=str(story), split="x", weights=[0.0, 1.0], seq_length=3)
    assert len(problems_of(dataset).splitlines()) == 4


def test_ranks_that_build_together_get_the_same_samples(story: Path, cache: str) -> None:
    def rank() -> list[list[int]]:
        dataset = GPTDatasetConfig(path=[str(story), str(story)], cache_dir=cache)
        return tokens_of(build_splits(dataset, train=30).train)

    first, second = run_ranks(2, rank)
    assert first == second
    assert not any(".partial-" in name for name in tree(Path(cache)))
    assert run_ranks(1, rank) == [first]


def test_a_mistake_is_the_same_error_on_every_rank(tmp_path: Path, cache: str) -> None:
    def rank() -> str:
        try:
            build_splits(GPTDatasetConfig(path=str(tmp_path / "absent"), cache_dir=cache))
        except ValueError as error:
            return str(error)
        return "no error"

    first, second = run_ranks(2, rank)
    assert first == second
    assert "there is no such" in first
