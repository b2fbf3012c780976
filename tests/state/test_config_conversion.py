import enum
import functools
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.enums import AttnBackend

from bridge.training.config.schema.convert import convert
from bridge.training.config.schema.errors import ConversionError, FieldProblems
from bridge.training.config.schema.fields import annotations_of
from bridge.training.config.schema.to_plain import to_plain
from bridge.training.config.schema.yaml12 import dump_yaml, load_yaml
from tiny_configs import Augmentation, TinyModel


class Color(enum.Enum):
    RED = 1
    GREEN = 2


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (True, bool, True),
        (3, int, 3),
        (1e3, int, 1000),
        (3, float, 3.0),
        ("x", str, "x"),
        (None, int | None, None),
        (None, Optional[int], None),  # noqa: UP045 - megatron-core writes it so
        (2, Union[int, list[int]], 2),  # noqa: UP007
        ([1, 2], Union[int, list[int]], [1, 2]),  # noqa: UP007
        (5, float | int, 5),
        (0.5, int | float, 0.5),
        ("1", int | str, "1"),
        ("token", Literal["token", "microbatch"], "token"),
        (2, Literal[2, 3], 2),
        ([1, 2], tuple[int, int], (1, 2)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ((1, 2), list[int], [1, 2]),
        ([1, 2], Sequence[int], [1, 2]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        ("RED", Color, Color.RED),
        ("flash", AttnBackend, AttnBackend.flash),
        ("bfloat16", torch.dtype, torch.bfloat16),
        ("bf16", torch.dtype, torch.bfloat16),
        ("torch.float16", torch.dtype, torch.float16),
        ("gelu", Callable[[torch.Tensor], torch.Tensor], F.gelu),
        ("silu", Callable, F.silu),
        ("quick_gelu", Callable, quick_gelu),
        ("squared_relu", typing.Callable, squared_relu),
        ("xavier_uniform", Callable | None, torch.nn.init.xavier_uniform_),
        ("torch.nn.init.zeros_", Callable, torch.nn.init.zeros_),
        ("a/b", pathlib.Path, pathlib.Path("a/b")),
        ("torch.nn.Linear", type[torch.nn.Module], torch.nn.Linear),
        ({"flip": True}, Augmentation, Augmentation(flip=True)),
        ({"anything": [1]}, Any, {"anything": [1]}),
    ],
)
def test_a_value_is_converted_to_its_annotated_type(
    value: Any, annotation: Any, expected: Any
) -> None:
    converted = convert(value, annotation, "x")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "says"),
    [
        (1, bool, "true or false, got 1"),
        ("true", bool, "got 'true'"),
        (True, int, "an integer, got True"),
        (1.5, int, "an integer, got 1.5"),
        ("3", int, "got '3'"),
        (True, float, "a number, got True"),
        ("1e-3", float, "a number"),
        (3, str, "a string, got 3"),
        (None, int, "an integer, got None"),
        ("abc", int | None, "an integer or null, got 'abc'"),
        ("tokens", Literal["token", "microbatch"], "did you mean 'token'"),
        (True, Literal[1, 2], "one of 1, 2"),
        ([1, "a"], list[int], "x[1]"),
        ([1, 2, 3], tuple[int, int], "a list of 2"),
        ("RAD", Color, "one of RED, GREEN"),
        ("bfloat17", torch.dtype, "did you mean 'bfloat16'"),
        ("gleu", Callable, "did you mean 'gelu'"),
        ("torch.nn.init.zeross_", Callable, "does not exist"),
        ("no_such_package.f", Callable, "no module 'no_such_package'"),
        ("torch.nn.init.math", Callable, "not a function"),
        (5, Augmentation, "expected Augmentation, got 5"),
        ({"flip": 3, "scale": [1, 2]}, Augmentation, "x.flip: expected true or false"),
        ({"flip": 3, "scale": [1, 2]}, Augmentation, "did you mean x.scales"),
    ],
)
def test_a_value_of_another_type_is_rejected_in_words(
    value: Any, annotation: Any, says: str
) -> None:
    with pytest.raises(ConversionError) as error:
        convert(value, annotation, "x")
    assert says in str(error.value)


def scale(tensor: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return tensor * factor


@dataclass(kw_only=True)
class Everything:
    flag: bool = True
    rate: float = 1e-05
    huge: float = float("inf")
    text: str = "1e-3"
    answer: str = "no"
    date: str = "2026-11-21"
    empty: str = ""
    nothing: str | None = None
    pair: tuple[int, int] = (1, 2)
    names: list[str] = field(default_factory=lambda: ["a", "12:30", "null"])
    nested: list[list[int]] = field(default_factory=lambda: [[1], [2, 3]])
    table: dict[str, float] = field(default_factory=lambda: {"a": 0.1})
    dtype: torch.dtype = torch.bfloat16
    activation: Callable[..., Any] = quick_gelu
    initializer: Callable[..., Any] = torch.nn.init.normal_
    other: Callable[..., Any] = torch.nn.functional.softplus
    color: AttnBackend = AttnBackend.fused
    place: pathlib.Path = pathlib.Path("a/b")
    kind: type = torch.nn.Linear
    part: Augmentation = field(default_factory=lambda: Augmentation(flip=True))
    child: Any = field(default_factory=lambda: TinyModel(width=3))


def test_every_kind_of_value_survives_the_way_through_yaml() -> None:
    value = Everything()
    text = dump_yaml(to_plain(value, Everything, ""))
    assert convert(load_yaml(text), Everything, "") == value
    assert "pair: [1, 2]" in text


@pytest.mark.parametrize(
    "nameless", [lambda x: x, functools.partial(lambda x: x), torch.Generator(), object()]
)
def test_a_value_without_a_name_is_rejected_with_its_field(nameless: Any) -> None:
    with pytest.raises(FieldProblems) as error:
        to_plain({"a": nameless}, Any, "model.thing")
    assert error.value.problems[0].text.startswith("model.thing.a: ")


def test_a_partial_of_a_named_function_is_written_with_its_arguments() -> None:
    plain = to_plain(functools.partial(torch.nn.init.normal_, std=0.5), Callable, "x")
    assert plain == {"_partial_": "normal", "std": 0.5}
    rebuilt = convert(plain, Callable, "x")
    assert rebuilt.func is torch.nn.init.normal_
    assert rebuilt.keywords == {"std": 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("0x10", 16),
        ("010", 10),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2026-11-21", "2026-11-21"),
        ("~", None),
        ("[a, 1, null]", ["a", 1, None]),
    ],
)
def test_yaml_reads_numbers_and_words_as_people_write_them(text: str, value: Any) -> None:
    assert load_yaml(text) == value


def test_a_key_that_occurs_twice_in_yaml_is_rejected() -> None:
    with pytest.raises(ConversionError, match="'a' is there twice"):
        load_yaml("a: 1\nb: 2\na: 3\n")


def test_an_annotation_for_type_checkers_only_accepts_anything() -> None:
    @dataclass
    class Foreign:
        known: int = 0
        unknown: "NowhereToBeFound" = None  # type: ignore[name-defined] # noqa: F821

    assert annotations_of(Foreign) == {"known": int, "unknown": Any | None}
