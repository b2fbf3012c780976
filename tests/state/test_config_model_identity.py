"""Model identity: the kind of every field of a model's section."""

from dataclasses import dataclass, field, fields

import pytest

from bridge.training.config import TransformerConfig
from bridge.training.config.model_identity import (
    MEGATRON_FIELDS,
    field_kinds,
    kind_at,
    model_field,
)
from bridge.training.config.schema.fields import is_runtime_hook


def test_every_field_of_megatron_cores_transformer_has_a_kind() -> None:
    names = {known.name for known in fields(TransformerConfig) if not is_runtime_hook(known)}
    assert set(MEGATRON_FIELDS) == names


@dataclass(kw_only=True)
class Part:
    width: int = 1
    hidden_dropout: float = 0.0
    noise: float = model_field("training", default=0.0)


@dataclass(kw_only=True)
class Whole:
    width: int = 1
    parts: dict[str, Part] = field(default_factory=dict)
    spread: dict[str, int] = model_field("execution", default_factory=dict)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("width", "identity"),
        ("parts.eye.width", "identity"),
        ("parts.eye.hidden_dropout", "training"),
        ("parts.eye.noise", "training"),
        ("spread.eye", "execution"),
    ],
)
def test_a_field_is_of_the_kind_that_its_section_or_megatron_core_gives_it(
    path: str, kind: str
) -> None:
    assert kind_at(path, field_kinds(Whole)) == kind
