"""No path that a user gives may be a URL: every field and every argument is asked."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.cli import command_parser, main
from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.recipes import gpt_tiny, gpt_tiny_sft
from bridge.mimo.recipes import mimo_digits
from bridge.training.config import ConfigContainer, ConfigError, resolve
from bridge.training.config.container import SECTIONS
from bridge.training.config.schema.fields import (
    annotations_of,
    describe_annotation,
    fields_of,
    parts_of,
)
from bridge.training.local_paths import holds_local_paths, is_url

URL = "s3://bucket/run"
NOT_PATHS_OF_OURS = {
    *("json_key", "prompt_key", "completion_key", "messages_key", "ignore_keys", "split"),
    *("wandb_project", "wandb_entity", "wandb_name", "modality", "freeze"),
}
NOT_PATHS_OF_THE_COMMAND = {"recipe", "overrides", "json_key", "to", "max_shard_size"}


def parts() -> Iterator[tuple[str, Any]]:
    for recipe in (gpt_tiny, gpt_tiny_sft, mimo_digits):
        config = recipe()
        for section in SECTIONS:
            yield from parts_of(getattr(config, section), section)


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each argument of each command, after the command's name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from commands(inner, f"{name} {command}".strip())
        else:
            yield name, action


def test_every_field_of_text_is_a_path_or_known_to_be_none() -> None:
    unknown = {
        (type(part).__name__, name)
        for _, part in parts()
        if type(part).__module__.startswith("bridge.")
        for name, field in fields_of(part).items()
        if name in vars(type(part)).get("__annotations__", {})
        and "a string" in describe_annotation(annotations_of(type(part))[name])
        and not holds_local_paths(field)
        and name not in NOT_PATHS_OF_OURS
    }
    assert unknown == set()


@pytest.mark.parametrize("recipe", [gpt_tiny, gpt_tiny_sft, mimo_digits])
def test_a_url_in_any_path_field_is_rejected_and_all_are_named(recipe: Any) -> None:
    config: ConfigContainer = recipe()
    wanted = []
    for section in SECTIONS:
        for path, part in parts_of(getattr(config, section), section):
            for name, field in fields_of(part).items():
                if holds_local_paths(field):
                    setattr(part, name, URL)
                    wanted.append(f"{path}.{name}='{URL}': is a URL")
    assert len(wanted) >= 5
    with pytest.raises(ConfigError) as error:
        resolve(config, device="cpu", world_size=1)
    lines = str(error.value).splitlines()
    assert [sum(line in said for said in lines) for line in wanted] == [1] * len(wanted)
    assert not [line for line in lines if URL in line and "is a URL" not in line]


def test_a_url_within_lists_and_mappings_is_named() -> None:
    config = gpt_tiny()
    config.dataset = GPTDatasetConfig(
        path=["a.txt", "hf://a/b"], validation_path={"wiki": ["gs://c/d"]}
    )
    with pytest.raises(ConfigError) as error:
        resolve(config, device="cpu", world_size=1)
    assert "dataset.path='hf://a/b': is a URL" in str(error.value)
    assert "dataset.validation_path.wiki='gs://c/d': is a URL" in str(error.value)


def test_every_argument_that_takes_text_is_a_path_or_known_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = command_parser()
    asked = 0
    for command, action in commands(parser):
        takes_text = action.nargs != 0 and action.type is None and not action.choices
        if not takes_text or action.dest in NOT_PATHS_OF_THE_COMMAND:
            continue
        # In the order of the command's arguments, with a plain path for each other one.
        given = command.split()
        for other in [a for c, a in commands(parser) if c == command and a.nargs != 0]:
            value = URL if other is action else "gpt-tiny"
            if other is action or other.required:
                value = other.choices[0] if other.choices else value
                given += [*other.option_strings[:1], value]
        assert main(given) == 2, given
        name = action.option_strings[0] if action.option_strings else action.metavar
        assert capsys.readouterr().err.startswith(f"bridge: {name}='{URL}': is a URL"), given
        asked += 1
    assert asked > 15
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((f"{scheme}x/y", True) for scheme in ("s3://", "https://", "hf://", "file:///", "gs:/")),
        *((path, False) for path in ("runs/a", "/a//b", "a:b", "C:/data", "10:30/log", "~/x", "")),
    ],
)
def test_urls_are_distinguished_from_paths(text: str, expected: bool) -> None:
    assert is_url(text) is expected
