from bridge.training.config import describe, reference_text
from tiny_configs import tiny_config


def test_every_key_is_listed_with_its_type_value_and_meaning() -> None:
    keys = {key.path: key for key in describe(tiny_config())}
    iters = keys["train.train_iters"]
    assert iters.value == "8"
    assert iters.accepts == "an integer or null"
    assert iters.meaning == "Optimizer steps."
    assert keys["train.nan_action"].accepts == "one of raise, raise_at_once, skip, log"
    assert keys["model.num_layers"].value == "4"
    assert keys["model.activation_func"].value == "gelu"
    assert keys["model.hidden_dropout"].meaning.startswith("Dropout probability")
    assert keys["optimizer.lr"].value == "0.0003"
    assert keys["dataset.augmentation.scales"].value == "[0.5, 2.0]"
    assert keys["tokenizer.type"].value == "bytes"
    assert keys["logger.wandb_project"].value == "null"


def test_fields_that_only_a_running_loop_sets_are_not_listed() -> None:
    paths = {key.path for key in describe(tiny_config())}
    assert not {"model.no_sync_func", "model.timers", "optimizer.timers"} & paths
    assert not any("._" in path for path in paths)


def test_the_text_groups_keys_by_section() -> None:
    text = reference_text(tiny_config(), width=80)
    assert "\ntrain:\n  train.train_iters=8  (an integer or null)\n      Optimizer steps." in text
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("      "))
