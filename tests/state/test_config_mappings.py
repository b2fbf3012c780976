"""A field that takes a path, paths or a mapping of names to them: YAML, command line and back."""

from dataclasses import dataclass
from typing import Any

import pytest

from bridge.training.config import ConfigContainer, ConfigError, apply_overrides, resolve
from bridge.training.contracts import DataRequest, DataSplits
from tiny_configs import tiny_config


@dataclass(kw_only=True)
class DataOfSets:
    """Data whose validation may be one set or several."""

    validation_path: str | list[str] | dict[str, str | list[str]] | None = None

    def build(self, request: DataRequest) -> DataSplits:
        raise NotImplementedError


def of_sets(value: Any = None) -> ConfigContainer:
    config = tiny_config()
    config.dataset = DataOfSets(validation_path=value)
    return config


def path_of(config: ConfigContainer) -> Any:
    assert isinstance(config.dataset, DataOfSets)
    return config.dataset.validation_path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{wiki: a.txt, code: b.txt}", {"wiki": "a.txt", "code": "b.txt"}),
        ("{wiki: [a.txt, b.txt]}", {"wiki": ["a.txt", "b.txt"]}),
        ("{'a b': a.txt}", {"a b": "a.txt"}),
        ("{}", {}),
        ("a.txt", "a.txt"),
        ("[a.txt, b.txt]", ["a.txt", "b.txt"]),
        ("{a,b}.txt", "{a,b}.txt"),
        ("null", None),
    ],
)
def test_a_mapping_is_read_on_the_command_line_and_in_yaml(text: str, value: Any) -> None:
    override = f"dataset.validation_path={text}"
    changed = apply_overrides(of_sets("before"), [override])
    assert path_of(changed) == value
    document = f"dataset: {{validation_path: {text}}}"
    if text != "{a,b}.txt":  # Not YAML.
        assert path_of(apply_overrides(of_sets(), yaml_documents=[document])) == value
    again = apply_overrides(of_sets(), yaml_documents=[changed.to_yaml()])
    assert path_of(again) == value


WRONG = [
    ("{wiki: 3}", "dataset.validation_path: expected a string or a list (a string), got 3 (at "
     "dataset.validation_path.wiki)"),
    ("{wiki: [a.txt, 3]}", "(at dataset.validation_path.wiki)"),
    ("{wiki: {deep: a.txt}}", "got {'deep': 'a.txt'} (at dataset.validation_path.wiki)"),
    ("{wiki: null}", "got None (at dataset.validation_path.wiki)"),
    ("{wiki:a.txt}", "got None (at dataset.validation_path.wiki:a.txt)"),
    ("{3: a.txt}", "dataset.validation_path: expected a string, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_mapping_is_rejected_by_field_and_name(text: str, message: str) -> None:
    for arguments in (
        {"overrides": [f"dataset.validation_path={text}"]},
        {"yaml_documents": [f"dataset: {{validation_path: {text}}}"]},
    ):
        with pytest.raises(ConfigError) as error:
            apply_overrides(of_sets(), **arguments)
        assert len(error.value.problems) == 1
        assert error.value.problems[0].startswith("dataset.validation_path: ")
        assert message in error.value.problems[0]


def test_a_wrong_mapping_of_python_code_is_rejected_by_field_and_name() -> None:
    with pytest.raises(ConfigError) as error:
        resolve(of_sets({"wiki": 3}), device="cpu", world_size=1)
    assert any("(at dataset.validation_path.wiki)" in line for line in error.value.problems)


def test_one_set_of_a_mapping_can_be_changed_by_its_name() -> None:
    changed = apply_overrides(of_sets({"wiki": "a.txt"}), ["dataset.validation_path.wiki=c.txt"])
    assert path_of(changed) == {"wiki": "c.txt"}
