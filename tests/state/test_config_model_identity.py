"""Model identity: the kind of every field of a model's section."""

from dataclasses import dataclass, field, fields

import pytest

from bridge.gpt.model_config import GPTModelConfig
from bridge.mimo.model_config import MultimodalModelConfig
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
    ("section", "path", "kind"),
    [
        (Whole, "width", "identity"),
        (Whole, "parts.eye.width", "identity"),
        (Whole, "parts.eye.hidden_dropout", "training"),
        (Whole, "parts.eye.noise", "training"),
        (Whole, "spread.eye", "execution"),
        (GPTModelConfig, "num_layers", "identity"),
        (GPTModelConfig, "vocab_size", "identity"),
        (GPTModelConfig, "seq_length", "extensible"),
        (GPTModelConfig, "rope_scaling_factor", "extensible"),
        (GPTModelConfig, "moe_aux_loss_coeff", "training"),
        (GPTModelConfig, "layer_spec", "execution"),
        (MultimodalModelConfig, "language.seq_length", "extensible"),
        (MultimodalModelConfig, "encoders.vision.image_size", "identity"),
        (MultimodalModelConfig, "encoders.vision.pipeline_model_parallel_size", "execution"),
        (MultimodalModelConfig, "parallelism.vision.rank_offset", "execution"),
        (MultimodalModelConfig, "projections.vision.kind", "identity"),
        (MultimodalModelConfig, "lr_multipliers.vision", "training"),
    ],
)
def test_a_field_is_of_the_kind_that_its_section_or_megatron_core_gives_it(
    section: type, path: str, kind: str
) -> None:
    assert kind_at(path, field_kinds(section)) == kind
