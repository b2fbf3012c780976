"""The public contract: what is named here exists with this signature. It grows, not changes."""

import dataclasses
import inspect
import pkgutil

import pytest

from readmes import READMES, imported

FUNCTIONS = {
    "bridge.training.pretrain.pretrain": [
        "config",
        "forward_step_func",
        "callbacks",
        "on_failure",
        "resume_line",
    ],
    "bridge.training.finetune.finetune": [
        "config",
        "forward_step_func",
        "callbacks",
        "on_failure",
        "resume_line",
    ],
    "bridge.training.setup.training_parts": ["config", "forward_step_func"],
    "bridge.training.train.train": ["run"],
    "bridge.training.step.train_step.train_step": [
        "forward_step",
        "data_iterator",
        "model",
        "optimizer",
        "scheduler",
        "state",
        "pg_collection",
        "num_microbatches",
        "reducer",
        "is_logged",
        "before_optimizer_step",
    ],
    "bridge.training.evaluate.evaluate": [
        "forward_step",
        "data_iterator",
        "model",
        "state",
        "num_samples",
        "pg_collection",
        "reducer",
        "collect_non_loss_data",
        "stop",
        "control_group",
        "name",
    ],
    "bridge.training.callbacks.CallbackContext.collect_non_loss_data": [
        "self",
        "forward_step_func",
        "name",
        "num_samples",
    ],
    "bridge.training.losses.masked_token_loss": [
        "loss_mask",
        "output_tensor",
        "check_for_nan_in_loss",
    ],
    "bridge.training.losses.masked_next_token_loss": [
        "loss_mask",
        "output_tensor",
        "check_for_nan_in_loss",
    ],
    "bridge.training.loss_reduction.token_mean": ["loss_sum", "count"],
    "bridge.training.loss_reduction.mean": ["value"],
    "bridge.training.loss_reduction.total": ["value"],
    "bridge.training.loss_reduction.maximum": ["value"],
    "bridge.training.loss_reduction.local": ["value"],
    "bridge.training.forward_step.prepare_forward_step_func": ["func", "state"],
    "bridge.training.gpt_step.forward_step": [
        "global_state",
        "data_iterator",
        "model",
        "return_schedule_plan",
    ],
    "bridge.training.gpt_step.get_batch": [
        "data_iterator",
        "inputs",
        "targets",
        "routers",
        "cp_group",
    ],
    "bridge.training.mimo_step.forward_step": [
        "state",
        "data_iterator",
        "model",
        "return_schedule_plan",
    ],
    "bridge.training.mimo_step.get_batch": ["data_iterator", "keys"],
    "bridge.training.mimo_step.loss_func": ["loss_mask", "output_tensor"],
    "bridge.training.checkpoint_weights.saved_config": ["checkpoint"],
    "bridge.training.checkpoint_weights.write_weights": ["checkpoint", "weights", "config"],
    "bridge.gpt.conversion.hf_config.read_model_config": ["directory"],
    "bridge.gpt.conversion.hf_import.import_hf": ["directory", "checkpoint", "dtype"],
    "bridge.gpt.model_config.GPTModelConfig.exported_weights": ["self"],
    "bridge.training.config.model_field": ["kind", "arguments"],
    "bridge.training.config.peft_method": ["method", "fields"],
    "bridge.training.merging.merge": ["checkpoint", "config", "output", "base"],
    "bridge.peft.LoRA.attach": ["self", "model_chunks", "group"],
    "bridge.peft.LoRA.merge": ["self", "model_chunks"],
    "bridge.training.config.resolve": ["config", "device", "world_size"],
}

LOW_RANK = ["target_modules", "exclude_modules", "dim", "alpha", "dropout", "dtype", "method"]

FIELDS = {
    "bridge.peft.LoRA": LOW_RANK,
    "bridge.peft.DoRA": LOW_RANK,
    "bridge.peft.CanonicalLoRA": LOW_RANK,
    "bridge.training.config.Problem": ["fields", "text"],
    "bridge.training.pretrain.TrainResult": [
        "reason",
        "step",
        "consumed_samples",
        "metrics",
        "validation",
        "run_dir",
    ],
    "bridge.training.evaluate.EvaluationResult": [
        "metrics",
        "samples",
        "planned_samples",
        "tokens",
        "complete",
        "non_loss_data",
    ],
    "bridge.training.contracts.DataSplits": [
        "train",
        "validation",
        "test",
        "shuffle",
        "collate",
        "fingerprint",
        "notes",
        "warnings",
        "items",
    ],
    "bridge.training.contracts.ExportedWeight": ["shape", "parts"],
    "bridge.training.contracts.ExportRequest": [
        "checkpoint",
        "config",
        "output",
        "dtype",
        "max_shard_size",
    ],
    "bridge.training.run.TrainingParts": [
        "config",
        "ranks",
        "state",
        "data",
        "model",
        "optimizer",
        "scheduler",
        "forward_step",
        "reducer",
        "directory",
        "checkpointer",
        "restored_from",
        "size",
        "changes",
    ],
    "bridge.training.step.train_step.StepResult": [
        "learning_rate",
        "grad_norm",
        "zeros_in_grad",
        "skipped",
        "samples",
        "padded_tokens",
        "reduced",
    ],
    "bridge.training.config.ConfigContainer": [
        "recipe",
        "command",
        "model",
        "peft",
        "train",
        "validation",
        "optimizer",
        "scheduler",
        "ddp",
        "dataset",
        "tokenizer",
        "logger",
        "checkpoint",
        "dist",
        "rng",
        "rerun",
        "mixed_precision",
    ],
}

OTHER_NAMES = [
    "bridge.gpt.sampling.sample_text",
    "bridge.mimo.accuracy.AnswerAccuracy",
    "bridge.mimo.data.microbatches.Collate",
    "bridge.training.callbacks.Callback",
    "bridge.training.callbacks.CallbackContext",
    "bridge.training.config.LoggerConfig",
    "bridge.training.config.TrainConfig",
    "bridge.training.config.apply_overrides",
    "bridge.training.contracts.Recipe",
    "bridge.training.state.GlobalState",
    "bridge.training.state.TrainState",
    "bridge.training.train.train_step",
]

STATE = ["cfg", "timers", "train_state", "tensorboard_logger", "wandb_logger", "close"]
RECIPES = [
    "gpt.gpt_tiny",
    "gpt.gpt_tiny_sft",
    "gpt.gpt_tiny_lora",
    "gpt.llama3_8b_lora",
    "gpt.gpt_125m",
    "gpt.llama3_1b",
    "gpt.llama3_8b",
    "mimo.mimo_digits",
    "mimo.mimo_llava",
]


def found(path: str) -> object:
    # What stands there, and not a module of the same name.
    place, _, name = path.rpartition(".")
    there: object = getattr(pkgutil.resolve_name(place), name)
    return there


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_has_the_parameters_that_callers_name(path: str) -> None:
    function = found(path)
    assert callable(function)
    assert [*inspect.signature(function).parameters] == FUNCTIONS[path]


def test_every_name_that_a_readme_imports_is_in_the_contract() -> None:
    recipes = {name.replace(".", ".recipes.") for name in RECIPES}
    promised = {*FUNCTIONS, *FIELDS, *OTHER_NAMES, *(f"bridge.{name}" for name in recipes)}
    pairs = {pair for path in READMES for pair in imported(path.read_text())}
    assert {f"{module}.{name}" for module, name in pairs} - promised == set()
    assert [path for path in OTHER_NAMES if not callable(found(path))] == []


@pytest.mark.parametrize("path", FIELDS)
def test_a_dataclass_has_the_fields_that_callers_read(path: str) -> None:
    kind = found(path)
    assert isinstance(kind, type)
    assert dataclasses.is_dataclass(kind)
    assert [field.name for field in dataclasses.fields(kind)] == FIELDS[path]


def test_results_cannot_be_changed() -> None:
    for path in (
        "bridge.training.pretrain.TrainResult",
        "bridge.training.step.train_step.StepResult",
        "bridge.training.evaluate.EvaluationResult",
    ):
        kind = found(path)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_the_state_has_what_forward_steps_use() -> None:
    from bridge.training.config import ConfigContainer
    from bridge.training.state import GlobalState

    recipe = found("bridge.gpt.recipes.gpt_tiny")
    config = recipe()  # type: ignore[operator]
    assert isinstance(config, ConfigContainer)
    state = GlobalState(config)
    # The loggers are properties of the class, so nothing is opened by looking.
    missing = [n for n in STATE if not hasattr(type(state), n) and n not in vars(state)]
    assert missing == []


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_is_a_function_that_returns_a_fresh_configuration(path: str) -> None:
    family, _, name = path.partition(".")
    recipe = found(f"bridge.{family}.recipes.{name}")
    first, second = recipe(), recipe()  # type: ignore[operator]
    assert first.recipe == name.replace("_", "-")
    assert first is not second
    assert first.train is not second.train
