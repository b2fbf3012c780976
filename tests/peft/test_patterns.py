"""Patterns select layers by name; one that matches nothing is rejected with the nearest name."""

import pytest
from torch.nn import Linear, Module, ModuleDict, ModuleList

from bridge.peft import LoRA
from bridge.peft.layers.module_names import named_modules
from bridge.peft.layers.patterns import matches

NAME = "decoder.layers.10.self_attention.linear_qkv"


@pytest.mark.parametrize(
    ("pattern", "is_match"),
    [
        ("linear_qkv", True),
        ("self_attention.linear_qkv", True),
        (NAME, True),
        ("*.layers.10.*.linear_qkv", True),
        ("*.layers.1*.linear_qkv", True),
        ("*", True),
        ("qkv", False),
        ("linear_qk", False),
        ("*.layers.1.*.linear_qkv", False),
        ("layers.10.*", False),
        ("decoder.layers.10", False),
    ],
)
def test_a_pattern_matches_the_end_of_a_name_or_with_a_star_all_of_it(
    pattern: str, is_match: bool
) -> None:
    assert matches(NAME, pattern) is is_match


def test_a_star_is_the_only_wildcard_in_a_pattern() -> None:
    assert matches("layers[0].linear", "*[0].linear")
    assert not matches("layers0.linear", "*[0].linear")
    assert not matches("layersX.linear", "*?.linea?")


def model() -> Module:
    blocks = [ModuleDict({"query": Linear(4, 4), "value": Linear(4, 4)}) for _ in range(2)]
    return ModuleDict({"blocks": ModuleList(blocks), "head": Linear(4, 2)})


def adapted(**fields: object) -> list[str]:
    return [layer.name for layer in LoRA(dim=2, **fields).attach([model()])]  # type: ignore[arg-type]


def test_layers_that_match_and_are_not_excluded_are_adapted() -> None:
    assert adapted(target_modules=["query", "head"]) == ["blocks.0.query", "blocks.1.query", "head"]
    assert adapted(target_modules=["*"], exclude_modules=["blocks.1.*", "head"]) == [
        "blocks.0.query",
        "blocks.0.value",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["qeury", "head"]},
            r"^peft.target_modules: 'qeury' matches no layer; did you mean 'query'\? "
            r"\(there are head, query, value\)$",
        ),
        (
            {"target_modules": ["blocks.3.query"]},
            r"did you mean 'blocks\.[01]\.query'\?",
        ),
        (
            {"target_modules": ["*"], "exclude_modules": ["vlaue"]},
            r"^peft.exclude_modules: 'vlaue' matches no layer; did you mean 'value'\?",
        ),
        (
            {"target_modules": ["blocks"]},
            r"^peft.target_modules: 'blocks' is blocks, which cannot be adapted: it is no linear",
        ),
        (
            {"target_modules": ["query"], "exclude_modules": ["blocks.*"]},
            r"^peft.exclude_modules=\[blocks.\*\]: leaves nothing to train of peft.target_modules=",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_rejected(
    fields: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(**fields)


def test_every_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="'hed' matches no layer") as error:
        adapted(target_modules=["hed", "head", "valeu"])
    assert len(str(error.value).splitlines()) == 2


def test_names_skip_wrappers() -> None:
    names = [name for name, _, _ in named_modules(model())]
    assert "blocks.1.value" in names
