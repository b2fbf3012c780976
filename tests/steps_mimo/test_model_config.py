"""The model's section: contradictions, derived fields, and the part of a parameter."""

from pathlib import Path
from typing import Any

import pytest

from bridge.cli.runs.starting_checkpoint import find_starting_checkpoint
from bridge.mimo.model_config import MultimodalModelConfig
from bridge.mimo.sections import ModuleParallelism
from bridge.training.checkpoint.manifest import write_manifest
from bridge.training.checkpoint.resume_rules import reject_another_model
from bridge.training.config import ConfigError, resolve
from bridge.training.config.model_identity import field_kinds, kind_at
from bridge.training.recipe_lookup import configure, find_recipe
from bridge.training.run_files.configuration import write_config
from mimo_models import mimo_run, resolved, tiny_mimo


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"freeze": ["vison"]}, "there is no 'vison'; did you mean 'vision'?"),
        ({"freeze": ["vision", "language"]}, "every module is frozen"),
        ({"lr_multipliers": {"vision.projecton": 2.0}}, "did you mean 'vision.projection'?"),
        ({"lr_multipliers": {"vision": 0.0}}, "must be above 0"),
        ({"special_token_ids": {}}, "'vision' has none"),
        ({"special_token_ids": {"vision": 1, "audio": 1}}, "give each its own token"),
        ({"parallelism": {"vision": ModuleParallelism(rank_offset=1)}}, "begin at rank 0"),
        (
            {"parallelism": {"vision": ModuleParallelism(pipeline_model_parallel_size=2)}},
            "colocated modules have no pipeline",
        ),
        ({"vision": {"patch_size": 3}}, "image_size=4: is not a multiple of"),
        ({"vision": {"sequence_parallel": True}}, "not supported by encoders"),
        ({"language": {"num_moe_experts": 2}}, "num_moe_experts=2: is not supported"),
        ({"language": {"kv_channels": 7}}, "model.language.kv_channels=7: a rotary embedding"),
        ({"language": {"context_parallel_size": 2}}, "context parallelism is not supported"),
    ],
)
def test_a_contradiction_is_rejected(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(mimo_run("unused", tiny_mimo(**fields)), device="cpu", world_size=1)
    assert says in str(caught.value)


def test_the_value_of_a_part_replaces_that_of_its_module() -> None:
    model = resolved(
        tiny_mimo(freeze=["vision.encoder"], lr_multipliers={"vision": 0.5, "vision.projection": 2})
    )
    encoder = "modality_submodules.vision.encoders.encoder.patch_embedding.weight"
    projection = "modality_submodules.vision.input_projections.0.linear.weight"
    assert (model.is_frozen(encoder), model.is_frozen(projection)) == (True, False)
    rates = [model.learning_rate_multiplier(name) for name in (encoder, projection, "language_mod")]
    assert rates == [0.5, 2, 1.0]


def test_modules_on_separate_ranks_send_shapes_ahead() -> None:
    asked = {"language": ModuleParallelism(tensor_model_parallel_size=2)}
    model = resolved(tiny_mimo(placement="separate", parallelism=asked), world_size=3)
    assert model.language.variable_seq_lengths
    assert model.language.tensor_model_parallel_size == 2
    assert model.encoders["vision"].tensor_model_parallel_size == 1
    assert not resolved(tiny_mimo()).language.variable_seq_lengths


@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_a_checkpoint_is_fine_tuned_by_its_own_recipe_under_any_placement(
    placement: str, tmp_path: Path
) -> None:
    recipe = find_recipe("mimo-digits")
    (tmp_path / ".metadata").touch()
    write_config(tmp_path / "config.yaml", configure(recipe, [], [], world_size=1))
    write_manifest(tmp_path)
    start = find_starting_checkpoint(str(tmp_path), recipe)
    ranks = 1 if placement == "colocated" else 2
    asked = [f"model.placement={placement}"]
    same = configure(recipe, [start.document], asked, world_size=ranks)
    reject_another_model(start.path, same)
    asked += ["model.language.num_layers=3"]
    other = configure(recipe, [start.document], asked, world_size=ranks)
    with pytest.raises(ConfigError, match="is of a model with"):
        reject_another_model(start.path, other)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("language.seq_length", "extensible"),
        ("encoders.vision.image_size", "identity"),
        ("encoders.vision.pipeline_model_parallel_size", "execution"),
        ("parallelism.vision.rank_offset", "execution"),
        ("projections.vision.kind", "identity"),
        ("lr_multipliers.vision", "training"),
    ],
)
def test_a_field_decides_the_models_identity_or_is_free(path: str, kind: str) -> None:
    assert kind_at(path, field_kinds(MultimodalModelConfig)) == kind
