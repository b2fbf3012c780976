import inspect
from importlib.metadata import entry_points
from typing import Any

import pytest

from bridge.gpt.recipes import gpt_125m, gpt_tiny, gpt_tiny_sft, llama3_1b, llama3_8b
from bridge.training.config import ConfigContainer, ConfigError, resolve
from bridge.training.contracts import Recipe
from gpt_models import open_fields_filled

LARGE = [gpt_125m, llama3_1b, llama3_8b]
ALL = [gpt_tiny, gpt_tiny_sft, *LARGE]


def weights(config: ConfigContainer) -> int:
    """Count the parameters of an unpadded model, norms and biases included."""
    m: Any = config.model
    groups = m.num_query_groups or m.num_attention_heads
    kv = m.hidden_size // m.num_attention_heads * groups
    ffn = m.ffn_hidden_size or 4 * m.hidden_size
    layer = m.hidden_size * (2 * m.hidden_size + 2 * kv)
    layer += m.hidden_size * ffn * (3 if m.gated_linear_unit else 2)
    norms = 1 if m.normalization == "RMSNorm" else 2
    layer += 2 * norms * m.hidden_size
    if m.add_bias_linear:
        layer += m.hidden_size + 2 * kv + m.hidden_size + ffn + m.hidden_size
    tables = m.vocab_size * m.hidden_size * (1 if m.share_embeddings_and_output_weights else 2)
    if m.position_embedding_type == "learned_absolute":
        tables += m.seq_length * m.hidden_size
    return int(m.num_layers * layer + tables + norms * m.hidden_size)


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_each_call_returns_a_fresh_configuration(recipe: Recipe) -> None:
    first, second = recipe(), recipe()
    assert first == second
    assert first.model is not second.model
    assert first.recipe == recipe.name


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_command_finds_each_by_its_name(recipe: Recipe) -> None:
    (found,) = entry_points(group="bridge.recipes", name=recipe.name)
    assert found.load() is recipe


@pytest.mark.parametrize(
    ("recipe", "published"),
    # The parameter counts of the checkpoints: gpt2, Llama-3.2-1B, Meta-Llama-3-8B.
    [(gpt_125m, 124_439_808), (llama3_1b, 1_235_814_400), (llama3_8b, 8_030_261_248)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_sizes_are_the_published_ones(recipe: Recipe, published: int) -> None:
    assert weights(recipe()) == published


@pytest.mark.parametrize("recipe", LARGE, ids=lambda recipe: recipe.name)
def test_large_recipe_needs_data_and_says_so(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="dataset.path") as caught:
        resolve(open_fields_filled(recipe()), device="cpu", world_size=32)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("recipe", LARGE, ids=lambda recipe: recipe.name)
def test_large_recipe_runs_on_mock_data_on_a_cluster(recipe: Recipe) -> None:
    config = recipe()
    config.dataset.mock = True  # type: ignore[attr-defined]
    resolved = resolve(open_fields_filled(config), device="cpu", world_size=32)
    assert ConfigContainer.from_yaml(resolved.to_yaml()) == resolved


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
        (4, {"pipeline_model_parallel_size": 2}),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ],
)
def test_tiny_recipe_fits_every_small_layout(world_size: int, layout: dict[str, int]) -> None:
    config = gpt_tiny()
    for name, value in layout.items():
        setattr(config.model, name, value)
    config = open_fields_filled(config)
    resolve(config, device="cpu", world_size=world_size)


def test_tiny_recipe_is_exact_on_a_cpu() -> None:
    resolved: Any = resolve(open_fields_filled(gpt_tiny()), device="cpu", world_size=1)
    assert resolved.mixed_precision.precision == "fp32"
    assert resolved.model.hidden_dropout == 0
    assert resolved.model.attention_dropout == 0
    assert resolved.model.vocab_size == 257


def test_tiny_recipe_trains_for_any_number_of_steps() -> None:
    for steps in (1, 2, 20):
        config = gpt_tiny()
        config.train.train_iters = steps
        resolve(open_fields_filled(config), device="cpu", world_size=1)


def test_summaries_are_one_line() -> None:
    for recipe in ALL:
        assert recipe.summary == inspect.cleandoc(recipe.summary)
        assert "\n" not in recipe.summary
