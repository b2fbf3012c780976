"""A method of the user's whose name is almost that of an optional one is not left uncalled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from bridge.training.config import ConfigError, resolve
from tiny_configs import TinyModel, TinyTransformer, tiny_config


def method(*_: Any) -> Any:
    raise AssertionError("nothing calls it")


@dataclass
class Data:
    build = method


def problems_of(section: str, base: type, **methods: Callable[..., Any]) -> list[str]:
    kind = type("Mine", (base,), {**methods, "__module__": __name__})
    try:
        resolve(tiny_config(**{section: kind()}), device="cpu", world_size=1)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("section", "base", "name", "meant"),
    [
        ("model", TinyModel, "lr_multiplier", "learning_rate_multiplier"),
        ("model", TinyModel, "lr_multiplyer", "learning_rate_multiplier"),
        ("model", TinyModel, "lr_mult", "learning_rate_multiplier"),
        ("model", TinyTransformer, "learning_rate_multipliers", "learning_rate_multiplier"),
        ("model", TinyModel, "problem", "problems"),
        ("model", TinyModel, "derive_fields", "derived_fields"),
        ("model", TinyModel, "flops_per_token", "training_flops_per_token"),
        ("model", TinyModel, "layout_pictures", "layout_picture"),
        ("dataset", Data, "problem", "problems"),
    ],
)
def test_a_misspelt_optional_method_is_named_with_the_one_that_was_meant(
    section: str, base: type, name: str, meant: str
) -> None:
    (problem,) = problems_of(section, base, **{name: method})
    assert problem.startswith(f"{section}.{name}: Mine has a method of this name, which nothing")
    assert f"did you mean {meant}?" in problem


def test_methods_of_ones_own_and_those_that_are_there_are_left_alone() -> None:
    assert problems_of("model", TinyModel, parameters_of=method, _lr_multiplier=method) == []
    assert problems_of("model", TinyModel, lr=method, lr_schedule=method) == []
    both: dict[str, Any] = {"more_problems": method, "problems": lambda self, config: []}
    assert problems_of("model", TinyModel, **both) == []


def test_half_of_a_pair_of_methods_is_named_with_the_other() -> None:
    (problem,) = problems_of("model", TinyModel, layout=method)
    assert problem.startswith("model.layout: is called only with layout_problems, which Mine")
