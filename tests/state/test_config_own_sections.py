"""Sections of the user's own: their problems in the report, and misspelled optional methods."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from bridge.training.config import ConfigError, Problem, configure, resolve
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
def test_a_misspelled_optional_method_is_named_with_the_one_that_was_meant(
    section: str, base: type, name: str, meant: str
) -> None:
    (problem,) = problems_of(section, base, **{name: method})
    assert problem.startswith(f"{section}.{name}: Mine has a method of this name, which nothing")
    assert f"did you mean {meant}?" in problem


def test_own_methods_and_methods_with_a_known_counterpart_are_accepted() -> None:
    assert problems_of("model", TinyModel, parameters_of=method, _lr_multiplier=method) == []
    assert problems_of("model", TinyModel, lr=method, lr_schedule=method) == []
    both: dict[str, Any] = {"more_problems": method, "problems": lambda self, config: []}
    assert problems_of("model", TinyModel, **both) == []


def test_half_of_a_pair_of_methods_is_named_with_the_other() -> None:
    (problem,) = problems_of("model", TinyModel, layout=method)
    assert problem.startswith("model.layout: is called only with layout_problems, which Mine")


@pytest.mark.parametrize(
    ("line", "is_reported"),
    [
        ("train.micro_batch_size=2: too many", False),
        ("dataset.size=64: more than train.micro_batch_size=2 samples", False),
        ("dataset.size=64: even", True),
        ("train.micro_batch_sizes=2: another field", True),
        (Problem(("train.micro_batch_size",), "too many samples at once"), False),
        (Problem(("dataset.size",), "other than train.micro_batch_size"), True),
    ],
)
def test_a_problem_of_a_section_is_left_out_if_it_is_about_a_rejected_value(
    line: str | Problem, is_reported: bool
) -> None:
    @dataclass
    class Checked(TinyModel):
        def problems(self, config: Any) -> list[str | Problem]:
            return [line]

    config, overrides = tiny_config(model=Checked()), ["train.micro_batch_size=two"]
    with pytest.raises(ConfigError) as error:
        configure(config, overrides, device="cpu", world_size=1)
    assert (str(line) in error.value.problems) == is_reported
