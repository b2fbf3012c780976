"""The container of a configuration, to and from YAML."""

import functools
import pickle

import pytest
import torch

from bridge.training.config import (
    ConfigContainer,
    ConfigError,
    TokenizerConfig,
    resolve,
)
from tiny_configs import (
    EagerTransformer,
    FrozenData,
    PlainData,
    TinyData,
    TinyModel,
    TinyTransformer,
    tiny_config,
)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("brief", [False, True])
def test_the_resolved_config_survives_yaml(device: str, brief: bool) -> None:
    config = tiny_config(
        model=TinyTransformer(
            activation_func=torch.nn.functional.silu,
            window_size=(4, 0),
            recompute_modules=["mlp"],
            init_method=torch.nn.init.xavier_uniform_,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        tokenizer=TokenizerConfig(type="tiktoken", model="x.json"),
        recipe="tiny",
    )
    resolved = resolve(config, device=device, world_size=2)  # type: ignore[arg-type]
    text = resolved.to_yaml(brief=brief)
    rebuilt = ConfigContainer.from_yaml(text)
    assert rebuilt == resolved
    assert rebuilt.to_yaml(brief=brief) == text
    assert "derived" in rebuilt.to_dict(brief=brief)
    assert resolve(rebuilt, device=device, world_size=2) == resolved  # type: ignore[arg-type]


def test_the_defaults_are_those_of_a_distributed_run_with_adam() -> None:
    config = ConfigContainer(model=TinyModel(), dataset=TinyData())
    assert config.ddp.use_distributed_optimizer
    assert config.ddp.overlap_grad_reduce
    assert config.ddp.overlap_param_gather
    assert config.optimizer.optimizer == "adam"
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.clip_grad == 1.0


def test_runtime_hooks_stay_out_of_the_text_and_derived_values_are_in_it() -> None:
    plain = resolve(tiny_config(), device="cpu", world_size=1).to_dict()
    assert not {"timers", "no_sync_func", "finalize_model_grads_func"} & plain["model"].keys()
    assert "timers" not in plain["optimizer"]
    assert plain["model"]["calculate_per_token_loss"] is True
    assert plain["dist"]["device"] == "cpu"
    assert plain["model"]["activation_func"] == "gelu"
    assert plain["model"]["_target_"] == "tiny_configs.TinyTransformer"


def test_values_that_have_no_name_are_all_listed() -> None:
    config = tiny_config(
        model=TinyTransformer(activation_func=lambda x: x, init_method=lambda x: x)
    )
    with pytest.raises(ConfigError) as error:
        config.to_yaml()
    assert [line.split(":")[0] for line in error.value.problems] == [
        "model.activation_func",
        "model.init_method",
    ]


def test_a_transformer_that_megatron_completes_at_once_can_be_written_and_rebuilt() -> None:
    config = tiny_config(model=EagerTransformer())
    rebuilt = ConfigContainer.from_yaml(resolve(config, device="cpu", world_size=1).to_yaml())
    assert isinstance(rebuilt.model, EagerTransformer)
    assert isinstance(rebuilt.model.init_method, functools.partial)
    assert rebuilt.model.init_method.keywords == {"mean": 0.0, "std": 0.02}


def test_a_section_that_is_no_dataclass_is_recorded_and_cannot_be_rebuilt() -> None:
    with pytest.raises(ConfigError, match=r"dataset: .* \(PlainData\) cannot be written"):
        tiny_config(dataset=PlainData()).to_yaml()


def test_a_frozen_section_is_written_and_rebuilt() -> None:
    config = resolve(tiny_config(dataset=FrozenData(size=64)), device="cpu", world_size=1)
    assert ConfigContainer.from_yaml(config.to_yaml()) == config


def test_everything_wrong_with_a_text_is_one_report() -> None:
    plain = tiny_config().to_dict()
    plain["train"]["train_iters"] = "abc"
    plain["train"]["trian_iters"] = 5
    plain["modle"] = {}
    plain["optimizer"]["lr"] = [1]
    plain["dataset"]["_target_"] = "tiny_configs.Missing"
    with pytest.raises(ConfigError) as error:
        ConfigContainer.from_dict(plain)
    assert len(error.value.problems) == 5
    text = str(error.value)
    assert text.startswith("5 problems in the configuration:\n  - ")
    for part in (
        "train.train_iters: expected an integer or null, got 'abc'",
        "train.trian_iters: unknown key; did you mean train.train_iters?",
        "modle: unknown key; did you mean model?",
        "optimizer.lr: expected a number or null",
        "dataset: 'tiny_configs.Missing' does not exist",
    ):
        assert part in text


def test_a_text_without_a_model_says_so() -> None:
    plain = tiny_config().to_dict()
    del plain["model"]
    with pytest.raises(ConfigError, match="model: has no value and no default"):
        ConfigContainer.from_dict(plain)


@pytest.mark.parametrize(
    "target", ["tiny_configs.PlainData", "tiny_configs.tiny_config", "tiny_configs.Augmentation"]
)
def test_a_target_must_be_a_dataclass_that_can_build(target: str) -> None:
    plain = tiny_config().to_dict()
    plain["dataset"] = {"_target_": target}
    with pytest.raises(ConfigError, match="dataset: "):
        ConfigContainer.from_dict(plain)


def test_text_that_is_not_sections_is_rejected() -> None:
    with pytest.raises(ConfigError, match="expected sections"):
        ConfigContainer.from_yaml("just words")
    with pytest.raises(ConfigError, match="not valid YAML"):
        ConfigContainer.from_yaml("a: [1")


def test_the_error_is_the_same_on_another_rank() -> None:
    error = ConfigError(["train.train_iters=0 must be positive"])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.problems == error.problems
