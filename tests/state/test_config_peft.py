"""The section whose class an installed package brings: found by its method's name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bridge.training.config import (
    ConfigContainer,
    ConfigError,
    apply_overrides,
    describe,
    peft_method,
)
from bridge.training.entry_points import PEFT_METHODS
from installed_packages import install
from tiny_configs import tiny_config

MODULE = """
from dataclasses import dataclass, field
from typing import Literal

@dataclass(kw_only=True)
class Small:
    method: Literal["small"] = "small"
    targets: list[str] = field(default_factory=lambda: ["a"])
    dim: int = 8

    def problems(self, config):
        if self.dim < 1:
            yield f"peft.dim={self.dim} must be positive"

    def attach(self, model_chunks, group=None):
        return []

    def merge(self, model_chunks):
        pass

@dataclass(kw_only=True)
class Smaller(Small):
    method: Literal["smaller"] = "smaller"
    targets: list[str] = field(default_factory=lambda: ["b"])
    alpha: float = 1.0
"""


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package that offers two methods."""
    (tmp_path / "small_methods.py").write_text(MODULE)
    offers = "[bridge.peft]\nsmall = small_methods:Small\nsmaller = small_methods:Smaller\n"
    install(tmp_path, "small-methods", offers, monkeypatch)


def rejected(*overrides: str, **arguments: object) -> list[str]:
    with pytest.raises(ConfigError) as error:
        apply_overrides(tiny_config(), overrides, **arguments)  # type: ignore[arg-type]
    return error.value.problems


@pytest.mark.usefixtures("methods")
def test_a_method_is_peft_methods_wherever_its_fields_are_set() -> None:
    config = apply_overrides(
        tiny_config(), ["peft.dim=4", "peft.targets=[x,y]", "peft.method=small"]
    )
    section = config.peft
    assert section is not None
    assert (section.method, section.dim, section.targets) == ("small", 4, ["x", "y"])  # type: ignore[attr-defined]
    again = ConfigContainer.from_yaml(config.to_yaml())
    assert again.peft == section
    assert "_target_" not in config.to_dict()["peft"]
    merged = apply_overrides(tiny_config(), yaml_documents=["peft: {method: small, dim: 3}"])
    assert merged.peft.dim == 3  # type: ignore[union-attr]
    assert apply_overrides(config, ["peft=null"]).peft is None
    assert "peft.targets" in {key.path for key in describe(config)}


@pytest.mark.usefixtures("methods")
def test_a_section_is_made_by_name_from_python() -> None:
    section: Any = peft_method("small", dim=4)
    assert (section.method, section.dim) == ("small", 4)
    with pytest.raises(ConfigError, match="peft.method: there is no 'smal'; did you mean 'small'"):
        peft_method("smal")
    with pytest.raises(ConfigError, match="peft.dimm: unknown key; did you mean peft.dim"):
        peft_method("small", dimm=4)


@pytest.mark.usefixtures("methods")
def test_another_method_takes_over_the_fields_that_were_set() -> None:
    config = apply_overrides(tiny_config(), ["peft.method=small", "peft.dim=4"])
    for changed in (
        apply_overrides(config, ["peft.method=smaller"]),
        apply_overrides(config, yaml_documents=["peft: {method: smaller, alpha: 1}"]),
    ):
        # Its own targets stay: those of the other were the other's default.
        assert (changed.peft.method, changed.peft.dim, changed.peft.targets) == (  # type: ignore[union-attr]
            "smaller",
            4,
            ["b"],
        )


@pytest.mark.usefixtures("methods")
def test_a_method_that_is_not_there_is_rejected_with_the_nearest() -> None:
    expected = "peft.method: there is no 'smal'; did you mean 'small'? (there are "
    [line] = rejected("peft.method=smal", "peft.dim=4")
    assert line.startswith(expected)
    [line] = rejected(yaml_documents=["peft: {method: smal, dim: 4}"])
    assert line.startswith(expected)


@pytest.mark.usefixtures("methods")
def test_fields_are_checked_as_those_of_every_section() -> None:
    assert rejected("peft.method=small", "peft.dimm=4", "peft.dim=x") == [
        "peft.dimm: unknown key; did you mean peft.dim?",
        "peft.dim: expected an integer, got 'x'",
    ]
    [line] = rejected("peft.dim=4")
    assert line.startswith("peft.dim: the run trains the model itself; choose peft.method")
    [line] = rejected(yaml_documents=["peft: {dim: 4}"])
    assert line.startswith("peft: needs method: one of ")


def test_without_a_package_of_methods_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nobodys = dataclasses.replace(PEFT_METHODS, name="bridge.none")
    monkeypatch.setattr("bridge.training.config.schema.peft_methods.PEFT_METHODS", nobodys)
    [line] = rejected("peft.method=lora")
    assert "such as bridge-peft (pip install --find-links DIST bridge-peft" in line
    paths = {key.path for key in describe(tiny_config())}
    assert "peft.method" in paths
