"""A configuration file, which may come from anybody, imports what it may and nothing else."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.config import ConfigContainer, ConfigError, apply_overrides
from installed_packages import install
from tiny_configs import TinyTransformer, tiny_config

MODULE = """
from dataclasses import dataclass
from pathlib import Path
from tiny_configs import TinyData
Path(__file__).with_name("marker").touch()

@dataclass(kw_only=True)
class Data(TinyData):
    pass

def act(x):
    return x.relu()
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that Python would find, and nobody has imported; returns what importing makes."""
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return tmp_path / "marker"


def problems_of(**model: Any) -> list[str]:
    plain = tiny_config(model=TinyTransformer()).to_dict()
    plain["model"] |= model
    with pytest.raises(ConfigError) as error:
        ConfigContainer.from_dict(plain)
    return error.value.problems


@pytest.mark.parametrize(
    "name",
    [
        "stranger.act",
        "os.system",
        "torch.os.system",
        "torch.nn.functional.torch.os.system",
        "torch.utils.cpp_extension.load",
        "torch.nn.functional.boolean_dispatch.__globals__.get",
        "bridge.training.config.schema.yaml12.yaml.load",
        "bridge.cli.__main__.main",
        "numpy.load",
    ],
)
def test_a_file_cannot_have_a_function_imported_that_could_do_anything(
    name: str, stranger: Path
) -> None:
    for value in (name, {"_partial_": name}):
        (problem,) = problems_of(activation_func=value)
        assert problem.startswith(f"model.activation_func: {name!r} is not imported, as")
    assert not stranger.exists()


@pytest.mark.parametrize(
    "function", [torch.nn.functional.softplus, torch.tanh, torch.nn.init.normal_, TinyTransformer]
)
def test_functions_of_tensors_and_of_the_program_travel_in_files(function: Any) -> None:
    config = tiny_config(model=TinyTransformer(activation_func=function))
    assert ConfigContainer.from_yaml(config.to_yaml()) == config


def test_a_class_of_a_stranger_is_built_once_the_program_imports_it_or_its_package_has_an_offer(
    tmp_path: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_config().to_dict()
    plain["dataset"]["_target_"] = "stranger.Data"
    with pytest.raises(ConfigError, match=r"dataset: 'stranger.Data' is not imported, .*recipes"):
        ConfigContainer.from_dict(plain)
    assert not stranger.exists()
    with monkeypatch.context() as package:
        install(tmp_path, "stranger", "[bridge.recipes]\nx = stranger:RECIPE\n", package)
        assert type(ConfigContainer.from_dict(plain).dataset).__module__ == "stranger"
    # Now it is imported, by the tests' program.
    assert type(ConfigContainer.from_dict(plain).dataset).__module__ == "stranger"


def test_imported_sections_of_a_package_without_offers_are_built_and_its_functions_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stranger: Path
) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "stranger.py").rename(tmp_path / "site-packages" / "stranger.py")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    plain = tiny_config(model=TinyTransformer()).to_dict()
    plain["dataset"]["_target_"] = "stranger.Data"
    with pytest.raises(ConfigError, match=r"dataset: 'stranger.Data' is not imported"):
        ConfigContainer.from_dict(plain)
    importlib.import_module("stranger")
    assert type(ConfigContainer.from_dict(plain).dataset).__module__ == "stranger"
    assert "is not imported" in problems_of(activation_func="stranger.act")[0]


def test_a_file_may_name_what_the_command_or_the_recipe_names(stranger: Path) -> None:
    config = tiny_config(model=TinyTransformer())
    document = {"model": {"activation_func": "stranger.act"}}
    override = "model.activation_func=stranger.act"
    changed: Any = apply_overrides(config, [override])
    apply_overrides(config, [override], yaml_documents=[document])
    apply_overrides(changed, [], yaml_documents=[document])
    assert changed.model.activation_func.__module__ == "stranger"
