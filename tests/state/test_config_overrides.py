from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.config import (
    ConfigContainer,
    ConfigError,
    TokenizerConfig,
    TrainConfig,
    YamlText,
    apply_overrides,
    configure,
    resolve,
)
from tiny_configs import Augmentation, FrozenData, PlainData, TinyTransformer, tiny_config


def problems_of(overrides: list[str], *, config: ConfigContainer | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        apply_overrides(config or tiny_config(), overrides)
    return error.value.problems


@pytest.mark.parametrize(
    ("override", "section", "value"),
    [
        ("train.train_iters=5", "train", 5),
        ("train.train_iters=1e3", "train", 1000),
        ("train.train_iters=null", "train", None),
        ("optimizer.lr=1e-3", "optimizer", 1e-3),
        ("optimizer.lr=1", "optimizer", 1.0),
        ("model.bf16=true", "model", True),
        ("model.params_dtype=bf16", "model", torch.bfloat16),
        ("model.activation_func=silu", "model", torch.nn.functional.silu),
        ("model.window_size=[4, 0]", "model", (4, 0)),
        ("model.recompute_modules=[mlp, moe]", "model", ["mlp", "moe"]),
        ("model.moe_layer_freq=[0,1]", "model", [0, 1]),
        ("model.cp_comm_type=p2p", "model", "p2p"),
        ("logger.wandb_name=17", "logger", "17"),
        ("logger.wandb_name=true", "logger", "true"),
        ("logger.wandb_name=2026-11-21", "logger", "2026-11-21"),
        ("logger.wandb_name=run #3", "logger", "run #3"),
        ("logger.wandb_name=a=b", "logger", "a=b"),
        ("logger.wandb_name=''", "logger", ""),
        ("dataset.path=data/**/*.txt", "dataset", "data/**/*.txt"),
        ("dataset.path=*.txt", "dataset", "*.txt"),
        ("dataset.path=@file: x", "dataset", "@file: x"),
        ("dataset.crop=random", "dataset", "random"),
        ("dataset.mixture=[a, b]", "dataset", ["a", "b"]),
    ],
)
def test_an_override_takes_the_type_of_its_field(override: str, section: str, value: Any) -> None:
    config = tiny_config()
    before = config.copy()
    changed = apply_overrides(config, [override])
    name = override.partition("=")[0].partition(".")[2]
    assert getattr(getattr(changed, section), name) == value
    assert type(getattr(getattr(changed, section), name)) is type(value)
    assert config == before


def test_an_override_reaches_into_a_nested_section() -> None:
    changed = apply_overrides(
        tiny_config(), ["dataset.augmentation.flip=true", "dataset.augmentation.scales=[1,2]"]
    )
    assert changed.dataset.augmentation == Augmentation(flip=True, scales=(1.0, 2.0))  # type: ignore[attr-defined]


def test_a_choice_that_is_null_in_yaml_is_still_that_choice() -> None:
    config = tiny_config()
    config.tokenizer = TokenizerConfig()
    changed = apply_overrides(config, ["tokenizer.type=null"])
    assert changed.tokenizer is not None
    assert changed.tokenizer.type == "null"


def test_an_override_fills_an_optional_section_and_null_empties_it() -> None:
    changed = apply_overrides(tiny_config(), ["tokenizer.type=tiktoken"])
    assert changed.tokenizer == TokenizerConfig(type="tiktoken")
    assert apply_overrides(changed, ["tokenizer=null"]).tokenizer is None


def test_a_frozen_section_can_be_changed_by_text() -> None:
    changed = apply_overrides(tiny_config(dataset=FrozenData(size=3)), ["dataset.size=64"])
    assert changed.dataset == FrozenData(size=64)


def test_three_wrong_keys_and_a_wrong_type_are_one_report_with_the_nearest_names() -> None:
    problems = problems_of(
        ["trian.train_iters=5", "model.num_layer=2", "train.lr=1e-3", "train.micro_batch_size=two"]
    )
    assert problems == [
        "trian.train_iters: unknown key; did you mean train.train_iters?",
        "model.num_layer: unknown key; did you mean model.num_layers?",
        "train.lr: unknown key; did you mean optimizer.lr?",
        "train.micro_batch_size: expected an integer, got 'two'",
    ]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.train_iters", "expected section.field=value"),
        ("train=5", "train: is a section, it cannot be '5'; set its fields, such as train."),
        ("train=null", "train: expected TrainConfig, got None"),
        ("train_iters=5", "did you mean train.train_iters?"),
        ("seed=5", "did you mean rng.seed?"),
        ("model.lr=1", "did you mean optimizer.lr?"),
        ("zzz.qqq=1", "zzz.qqq: unknown key"),
        ("train.=1", "train.: unknown key"),
        ("train.train_iters=", "has no value"),
        ("train.train_iters.x=1", "train.train_iters has no fields"),
        ("dataset.augmentation.flop=1", "dataset.augmentation.flop: unknown key"),
        ("train.train_iters=1.5", "train.train_iters: expected an integer or null, got 1.5"),
        ("train.train_iters=1_000", "got '1_000'"),
        ("model.bf16=1", "model.bf16: expected true or false, got 1"),
        ("model.window_size=[1]", "model.window_size: expected"),
        ("model.no_sync_func=gelu", "model.no_sync_func: is set by the loop"),
        ("dataset.mixture=a", "dataset.mixture: expected a list"),
        ("recipe=other", "recipe: it is chosen by its name"),
    ],
)
def test_wrong_usage_of_an_override_is_explained(override: str, says: str) -> None:
    (problem,) = problems_of([override])
    assert says in problem


def test_a_section_that_is_no_dataclass_is_not_changed_by_text() -> None:
    (problem,) = problems_of(["dataset.size=3"], config=tiny_config(dataset=PlainData()))
    assert "is not a dataclass, so text cannot change it" in problem


def test_documents_merge_in_order_and_overrides_go_on_top(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("train: {train_iters: 7}\ndataset: {augmentation: {flip: true}}\n")
    changed = apply_overrides(
        tiny_config(),
        ["optimizer.lr=3e-3"],
        yaml_documents=[
            "train: {train_iters: 6, micro_batch_size: 1}\noptimizer: {lr: 1e-3}\n",
            file,
            {"tokenizer": {"type": "tiktoken"}},
            "",
        ],
    )
    assert changed.train == TrainConfig(train_iters=7, micro_batch_size=1, global_batch_size=8)
    assert changed.optimizer.lr == 3e-3
    assert changed.dataset.augmentation == Augmentation(flip=True)  # type: ignore[attr-defined]
    assert changed.tokenizer == TokenizerConfig(type="tiktoken")


def test_problems_of_all_documents_and_overrides_are_one_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(
            tiny_config(recipe="tiny"),
            ["train.trian_iters=3"],
            yaml_documents=[
                "recipe: other\nmodel: {_target_: a.B}\ntrain: 3\n",
                "dataset: null\noptimizer: {lrr: 1}\nlogger: {wandb_name: 17}\n",
                "[1",
                YamlText(text="- 1", source="own.yaml"),
                tmp_path / "absent.yaml",
            ],
        )
    text = "\n".join(error.value.problems)
    assert len(error.value.problems) == 10
    for part in (
        "recipe: it belongs to 'other', and this run is of 'tiny' (YAML document 1)",
        "model: _target_ is 'a.B', and this run's is 'tiny_configs.TinyTransformer'",
        "train: is a section",
        "dataset: expected a DatasetConfig, got None",
        "optimizer.lrr: unknown key; did you mean optimizer.lr? (YAML document 2)",
        "logger.wandb_name: expected a string or null, got 17 (YAML document 2)",
        "not valid YAML",
        "expected sections with their fields, got [1] (own.yaml)",
        "absent.yaml",
        "train.trian_iters: unknown key",
    ):
        assert part in text


def test_wrong_values_and_contradictions_are_one_report_without_echoes() -> None:
    with pytest.raises(ConfigError) as error:
        configure(
            tiny_config(train=TrainConfig(global_batch_size=8)),
            ["train.train_iter=5", "train.micro_batch_size=two", "model.hidden_size=9"],
            device="cpu",
            world_size=3,
        )
    assert error.value.problems == [
        "train.train_iter: unknown key; did you mean train.train_iters?",
        "train.micro_batch_size: expected an integer, got 'two'",
        "model.hidden_size=9: is not a multiple of model.num_attention_heads=4; "
        "change one, or give model.kv_channels",
    ]


def test_the_device_may_be_decided_when_the_overrides_are_known() -> None:
    config = configure(
        tiny_config(),
        ["dist.device=cuda"],
        device=lambda config: "cuda" if config.dist.device == "cuda" else "cpu",
        world_size=1,
    )
    assert config.mixed_precision.precision == "bf16"


@pytest.mark.parametrize("as_document", [False, True])
def test_a_saved_config_follows_an_override_of_the_value_it_was_derived_from(
    as_document: bool,
) -> None:
    saved = resolve(
        tiny_config(
            model=TinyTransformer(
                pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
            )
        ),
        device="cuda",
        world_size=2,
    ).to_yaml()
    overrides = [
        "mixed_precision.precision=fp32",
        "train.loss_normalization=microbatch",
        "ddp.use_distributed_optimizer=false",
        "ddp.overlap_param_gather=false",
        "model.virtual_pipeline_model_parallel_size=null",
        "dist.device=cpu",
    ]
    start = tiny_config() if as_document else ConfigContainer.from_yaml(saved)
    documents = [saved] if as_document else []
    config = configure(start, overrides, yaml_documents=documents, device="cpu", world_size=2)
    model: Any = config.model
    assert not model.bf16
    assert model.params_dtype == model.pipeline_dtype == torch.float32
    assert not config.optimizer.bf16
    assert config.optimizer.params_dtype == torch.float32
    assert not config.optimizer.use_distributed_optimizer
    assert not model.calculate_per_token_loss
    assert (model.overlap_p2p_comm, model.batch_p2p_comm) == (False, True)
    assert config.dist.device == "cpu"


def test_an_override_that_contradicts_a_saved_config_is_rejected() -> None:
    saved = ConfigContainer.from_yaml(resolve(tiny_config(), device="cuda", world_size=1).to_yaml())
    with pytest.raises(ConfigError, match=r"model.bf16=false: contradicts mixed_precision"):
        configure(saved, ["model.bf16=false"], device="cuda", world_size=1)
