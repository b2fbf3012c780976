"""Sections with dataclasses inside, in fields and in mappings: a model of several modules."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bridge.training.config import (
    ConfigContainer,
    ConfigError,
    Layout,
    MixedPrecisionConfig,
    apply_overrides,
    configure,
    describe,
    layout_of,
    resolve,
)
from tiny_configs import TinyTransformer, tiny_config


@dataclass(kw_only=True)
class Spread:
    """The parallel layout of one module."""

    tensor_model_parallel_size: int = 1


@dataclass(kw_only=True)
class Modules:
    """A model of a language model and encoders by name."""

    language: TinyTransformer = field(default_factory=TinyTransformer)
    encoders: dict[str, TinyTransformer] = field(
        default_factory=lambda: {"vision": TinyTransformer(num_layers=2)}
    )
    spread: Spread = field(default_factory=Spread)
    rates: dict[str, float] = field(default_factory=dict)
    seq_length: int = 16

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        raise NotImplementedError

    def derived_fields(self, config: ConfigContainer) -> Mapping[str, tuple[Any, str]]:
        size = self.spread.tensor_model_parallel_size
        reason = f"model.spread.tensor_model_parallel_size={size}"
        return {"language.tensor_model_parallel_size": (size, reason)}

    def layout(self, world_size: int) -> Layout:
        whole = layout_of(None, world_size)
        size = self.spread.tensor_model_parallel_size
        return dataclasses.replace(whole, tensor=size, data=world_size // size)

    def layout_problems(self, world_size: int) -> Iterable[str]:
        size = self.spread.tensor_model_parallel_size
        if world_size % size:
            yield f"model.spread.tensor_model_parallel_size={size} does not divide {world_size}"


def modules(**fields: Any) -> ConfigContainer:
    return tiny_config(model=Modules(**fields))


def problems_of(*overrides: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as error:
        configure(modules(), overrides, device="cpu", world_size=world_size)
    return error.value.problems


def test_an_override_reaches_into_a_mapping_of_sections() -> None:
    changed: Any = apply_overrides(
        modules(),
        [
            "model.encoders.vision.num_layers=3",
            "model.language.hidden_size=16",
            "model.rates.vision.encoder=0.5",
            "model.rates.language=1",
        ],
    ).model
    assert changed.encoders["vision"].num_layers == 3
    assert changed.encoders["vision"].hidden_size == 8
    assert changed.language.hidden_size == 16
    assert changed.rates == {"vision.encoder": 0.5, "language": 1.0}
    assert isinstance(changed.rates["language"], float)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.encoders.vison.num_layers=3", "did you mean model.encoders.vision?"),
        ("model.encoders.vision.num_layer=3", "did you mean model.encoders.vision.num_layers?"),
        ("model.langauge.num_layers=3", "did you mean model.language?"),
        (
            "model.num_layers=3",
            "did you mean model.language.num_layers or model.encoders.vision.num_layers?",
        ),
        ("model.encoders.vision=3", "is a section, it cannot be '3'; set its fields, such as"),
        ("model.encoders.vision.num_layers=x", "num_layers: expected an integer, got 'x'"),
        ("model.rates.vision=fast", "model.rates.vision: expected a number, got 'fast'"),
        ("model.encoders.vision.num_layers.x=1", "model.encoders.vision.num_layers has no fields"),
    ],
)
def test_a_wrong_key_or_value_within_is_explained_with_its_whole_path(
    override: str, says: str
) -> None:
    (problem,) = problems_of(override)
    assert problem.startswith(override.partition("=")[0][:12])
    assert says in problem


def test_a_document_merges_into_a_mapping_and_may_add_to_it() -> None:
    document = """
    model:
      language: {num_layers: 6}
      encoders:
        vision: {num_layers: 5}
        audio: {num_layers: 7, hidden_size: 4}
    """
    changed: Any = apply_overrides(modules(), yaml_documents=[document]).model
    assert changed.language.num_layers == 6
    assert {name: part.num_layers for name, part in changed.encoders.items()} == {
        "vision": 5,
        "audio": 7,
    }
    with pytest.raises(ConfigError, match="model.encoders.vision.num_layer: unknown key"):
        apply_overrides(modules(), yaml_documents=["model: {encoders: {vision: {num_layer: 1}}}"])


@pytest.mark.parametrize("brief", [True, False])
def test_parts_survive_the_way_through_yaml_without_naming_their_class(brief: bool) -> None:
    config = resolve(modules(), device="cpu", world_size=1)
    plain = config.to_dict(brief=brief)
    assert "_target_" not in plain["model"]["encoders"]["vision"]
    assert ("calculate_per_token_loss" in plain["model"]["language"]) is True
    assert ("qk_layernorm" in plain["model"]["encoders"]["vision"]) is not brief
    if not brief:
        assert ConfigContainer.from_yaml(config.to_yaml()) == config


def test_precision_loss_and_layout_reach_every_part() -> None:
    config = modules(spread=Spread(tensor_model_parallel_size=2))
    config.mixed_precision = MixedPrecisionConfig(precision="bf16")
    model: Any = resolve(config, device="cpu", world_size=4).model
    for part in (model.language, model.encoders["vision"]):
        assert part.bf16
        assert part.params_dtype is torch.bfloat16
        assert part.calculate_per_token_loss
    assert model.language.tensor_model_parallel_size == 2
    assert model.encoders["vision"].tensor_model_parallel_size == 1


def test_a_derived_value_in_a_part_follows_when_a_saved_config_is_changed() -> None:
    saved = resolve(modules(), device="cpu", world_size=1).to_yaml()
    changed: Any = configure(
        modules(),
        ["mixed_precision.precision=bf16", "model.spread.tensor_model_parallel_size=2"],
        yaml_documents=[saved],
        device="cpu",
        world_size=2,
    ).model
    assert changed.encoders["vision"].params_dtype is torch.bfloat16
    assert changed.language.tensor_model_parallel_size == 2


def test_a_contradiction_in_a_part_is_reported_with_both_fields() -> None:
    assert problems_of("model.language.tensor_model_parallel_size=2") == [
        "model.language.tensor_model_parallel_size=2: contradicts "
        "model.spread.tensor_model_parallel_size=1, from which 1 follows; remove the one or "
        "change the other"
    ]


def test_the_layout_is_the_sections_own() -> None:
    assert problems_of("model.spread.tensor_model_parallel_size=2", world_size=3) == [
        "model.spread.tensor_model_parallel_size=2 does not divide 3"
    ]
    (problem,) = problems_of("train.micro_batch_size=8", world_size=2)
    assert "times 2 data-parallel replicas" in problem
    config = modules(spread=Spread(tensor_model_parallel_size=2))
    assert layout_of(config.model, 6).data == 3


def test_each_transformer_is_checked_by_its_own_sizes() -> None:
    assert problems_of("model.encoders.vision.hidden_size=9") == [
        "model.encoders.vision.hidden_size=9: is not a multiple of "
        "model.encoders.vision.num_attention_heads=4; change one, "
        "or give model.encoders.vision.kv_channels"
    ]
    (problem,) = problems_of("model.encoders.vision.recompute_granularity=full")
    assert problem.startswith("model.encoders.vision.recompute_granularity=full: ")


def test_values_that_python_set_within_parts_are_checked_too() -> None:
    config = modules()
    config.model.language.num_layers = "four"  # type: ignore[attr-defined]
    config.model.encoders["vision"].num_layer = 4  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as error:
        resolve(config, device="cpu", world_size=1)
    assert error.value.problems == [
        "model.language.num_layers: expected an integer, got 'four'",
        "model.encoders.vision.num_layer: unknown key; did you mean "
        "model.encoders.vision.num_layers?",
    ]


def test_a_value_without_a_name_within_a_part_is_rejected_with_its_path() -> None:
    config = modules()
    config.model.encoders["vision"].init_method = lambda x: x  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="model.encoders.vision.init_method"):
        config.to_dict()


def test_every_key_of_every_part_is_listed() -> None:
    keys = {key.path: key for key in describe(modules(rates={"vision": 0.5}))}
    assert keys["model.encoders.vision.num_layers"].value == "2"
    assert keys["model.language.num_layers"].value == "4"
    assert keys["model.rates"].value == "{vision: 0.5}"
    assert "model.encoders" not in keys


def test_overrides_leave_the_parts_of_the_original_alone() -> None:
    config: Any = modules()
    apply_overrides(config, ["model.encoders.vision.num_layers=9", "model.rates.vision=2"])
    assert config.model == Modules()
