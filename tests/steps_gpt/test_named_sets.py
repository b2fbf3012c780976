"""Several validation and test sets of text, each from its own paths."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.recipes import gpt_tiny
from bridge.gpt.run_summary import RunSummary
from bridge.training.config import ConfigError, TokenizerConfig, configure
from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from gpt_data import build_splits, container, tree, write_pair, write_story
from gpt_tiny_runs import SMALL
from ranks import run_ranks

NUMBERS = TokenizerConfig(type="null", vocab_size=100_000)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def pair_of(tmp_path: Path, name: str, first: int, documents: int = 4) -> str:
    """Write token files whose tokens count up from `first`, in documents of 50."""
    documents_of = [
        list(range(first + 50 * number, first + 50 * (number + 1))) for number in range(documents)
    ]
    return write_pair(tmp_path / name, documents_of)


def thousands(dataset: Any) -> set[int]:
    """Return the thousands digits of the tokens of a set."""
    return {int(token) // 1000 for i in range(len(dataset)) for token in dataset[i]["tokens"]}


def test_each_name_is_a_set_with_its_own_paths(tmp_path: Path, cache: str) -> None:
    dataset = GPTDatasetConfig(
        path=pair_of(tmp_path, "train", 0),
        validation_path={
            "wiki": pair_of(tmp_path, "wiki", 1000),
            "code": [pair_of(tmp_path, "c", 2000), pair_of(tmp_path, "cpp", 3000, documents=8)],
        },
        test_path={"held out": pair_of(tmp_path, "test", 4000)},
        cache_dir=cache,
    )
    splits = build_splits(dataset, tokenizer=NUMBERS)
    assert isinstance(splits.validation, Mapping)
    assert isinstance(splits.test, Mapping)
    assert list(splits.validation) == ["wiki", "code"]
    assert list(splits.test) == ["held out"]
    assert thousands(splits.train) == {0}
    wiki, code = splits.validation["wiki"], splits.validation["code"]
    assert (thousands(wiki), len(wiki)) == ({1}, (200 - 1) // 32)
    assert (thousands(code), len(code)) == ({2, 3}, (200 - 1) // 32 + (400 - 1) // 32)
    assert thousands(splits.test["held out"]) == {4}
    assert splits.notes["validation/wiki tokens"] == 200
    assert splits.notes["validation/code documents"] == 12
    assert list(dataset.problems(container(dataset, tokenizer=NUMBERS))) == []


def test_one_test_set_next_to_several_validation_sets_stays_unnamed(
    tmp_path: Path, cache: str
) -> None:
    dataset = GPTDatasetConfig(
        path=pair_of(tmp_path, "train", 0),
        validation_path={"wiki": pair_of(tmp_path, "wiki", 1000)},
        test_path=pair_of(tmp_path, "test", 4000),
        cache_dir=cache,
    )
    splits = build_splits(dataset, tokenizer=NUMBERS)
    assert isinstance(splits.validation, Mapping)
    assert list(splits.validation) == ["wiki"]
    assert thousands(splits.test) == {4}
    none = build_splits(dataset, validation=0, test=0, tokenizer=NUMBERS)
    assert (none.validation, none.test) == (None, None)


def test_a_set_that_is_too_small_is_an_error_with_its_name(tmp_path: Path, cache: str) -> None:
    dataset = GPTDatasetConfig(
        path=pair_of(tmp_path, "train", 0),
        validation_path={
            "wiki": pair_of(tmp_path, "wiki", 1000),
            "code": write_pair(tmp_path / "code", [[1, 2, 3]]),
        },
        cache_dir=cache,
    )
    with pytest.raises(ValueError, match="the validation/code data holds 3 tokens in all"):
        build_splits(dataset, tokenizer=NUMBERS)


@pytest.mark.parametrize(
    ("field", "value", "messages"),
    [
        ("validation_path", {}, ["dataset.validation_path={}: names no set"]),
        ("validation_path", {"a/b": "{story}"}, ["dataset.validation_path: the name 'a/b' of a"]),
        ("test_path", {"": "{story}"}, ["dataset.test_path: the name '' of a set"]),
        ("test_path", {"a": []}, ["dataset.test_path.a: there is no path"]),
        ("validation_path", {"a": ""}, ["dataset.validation_path.a: an empty string is no path"]),
        (
            "validation_path",
            {"a": "absent", "b": "{story}", "c": ["{story}", "missing"]},
            ["dataset.validation_path.a='absent'", "dataset.validation_path.c='missing'"],
        ),
    ],
)
def test_every_mistake_in_the_sets_is_reported_before_anything_is_built(
    field: str, value: dict[str, Any], messages: list[str], tmp_path: Path
) -> None:
    story = str(write_story(tmp_path / "story.txt"))

    def filled(entry: Any) -> Any:
        if isinstance(entry, list):
            return [filled(item) for item in entry]
        return entry.replace("{story}", story)

    paths: Any = {field: {name: filled(entry) for name, entry in value.items()}}
    dataset = GPTDatasetConfig(path=story, cache_dir=str(tmp_path / "cache"), **paths)
    problems = list(dataset.problems(container(dataset)))
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert problem.startswith(message)
    assert tree(tmp_path) == ["story.txt"]


def test_mock_data_and_paths_of_evaluation_exclude_each_other(tmp_path: Path) -> None:
    story = str(write_story(tmp_path / "story.txt"))
    dataset = GPTDatasetConfig(mock=True, validation_path={"a": story})
    problems = list(dataset.problems(container(dataset)))
    assert problems == ["dataset.mock=true and dataset.validation_path: there is either; leave "
                        "one out"]  # fmt: skip


def test_a_run_evaluates_sets_that_the_command_line_names(tmp_path: Path) -> None:
    write_story(tmp_path / "train.txt", paragraphs=600)
    write_story(tmp_path / "a.txt", paragraphs=100)
    (tmp_path / "b.txt").write_text("abc " * 2000)

    def body() -> Any:
        config = configure(
            gpt_tiny(),
            [
                *(override for override in SMALL if "eval_iters" not in override),
                f"dataset.path={tmp_path}/train.txt",
                f"dataset.validation_path={{story: {tmp_path}/a.txt, code: [{tmp_path}/b.txt]}}",
                f"dataset.cache_dir={tmp_path}/cache",
                "train.train_iters=2",
                "validation.eval_iters=2",
                "checkpoint.save_at_end=false",
                f"checkpoint.run_dir={tmp_path}/run",
            ],
            device="cpu",
            world_size=2,
        )
        summary: list[str] = []

        class Listener:
            def on_train_end(self, context: Any) -> None:
                summary.extend(context.summary)

        result = pretrain(config, forward_step, [RunSummary(num_tokens=8), Listener()])
        return dict(result.validation), summary

    (validation, summary), (same, _) = run_ranks(2, body, timeout=120, process_group=False)
    assert validation == same
    assert list(validation) == ["story/lm loss", "code/lm loss"]
    assert validation["story/lm loss"] != validation["code/lm loss"]
    for line, name in zip(summary[-2:], ("story", "code"), strict=True):
        assert line.startswith(f"validation/{name} {validation[f'{name}/lm loss']:.3f} nats/byte")
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "validation_path:\n    story:" in saved


def test_a_wrong_mapping_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        configure(gpt_tiny(), ["dataset.validation_path={wiki: 3}"], device="cpu", world_size=1)
    [problem] = error.value.problems
    assert problem.startswith("dataset.validation_path: expected a string")
    assert "dataset.validation_path.wiki" in problem
