"""The model that ``bridge finetune --from`` starts from, and what a recipe may change of it.

Its checkpoint decides what the model is and which tokenizer goes with it; the recipe and the user
decide how it is computed, spread over ranks and regularised.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.cli.resume import FREE_MODEL_FIELDS, flat
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer
    from bridge.training.contracts import Recipe

# Parts of the names of fields that the recipe decides, beside those that a resumed run may change:
# how a model is trained, and how megatron-core computes it. All others are the checkpoint's.
_RECIPE_FIELDS = (
    *("dropout", "init_method", "initialization", "loss_coeff", "loss_scaling_factor"),
    *("freeze", "lr_multipliers", "placement"),
    *("load_balancing", "bias_update_rate", "jitter", "capacity", "token_drop", "force_"),
    *("grouped_gemm", "dispatcher", "deepep", "hybridep", "ncclep", "num_sms", "paged_stash"),
    *("p2p", "vp_stage", "variable_seq_lengths", "max_seqlen", "mlp_chunks", "wgrad"),
    *("activation_checkpoints", "saved_activations", "deterministic", "rng_tracker", "autocast"),
    *("logging", "inference", "prefill", "flash", "kernel_backend", "fused", "_layer_norm", "fp4"),
)
# Taken from the checkpoint, unless the user wants longer samples.
_EXTENSIBLE = ("seq_length", "rotary_base", "rope_scaling", "rope_scaling_factor")


@dataclass(frozen=True)
class Base:
    """A checkpoint to start from."""

    checkpoint: Path
    """Its directory, absolute: the run is not tied to where the command was given."""
    model: dict[str, Any]
    """What the model is: the fields of its section that the checkpoint decides."""
    tokenizer: dict[str, Any] | None
    """Its tokenizer's section; None if the run had none that knows text."""

    @property
    def document(self) -> str:
        """A YAML document that puts the model and its tokenizer on a recipe."""
        from bridge.training.config.schema.yaml12 import dump_yaml

        sections = {"model": self.model, "tokenizer": self.tokenizer}
        return dump_yaml({name: section for name, section in sections.items() if section})

    def refuse_another_model(self, config: "ConfigContainer") -> None:
        """Refuse a configuration that makes another model of it.

        Raises:
            ConfigError: With a line for each field that differs.
        """
        from bridge.training.config import ConfigError

        problems = list(self._differences(flat(config.to_dict()["model"])))
        if problems:
            raise ConfigError(problems)

    def _differences(self, wanted: dict[str, Any]) -> Iterator[str]:
        for name, value in flat(self.model).items():
            if name not in _EXTENSIBLE and wanted.get(name) != value:
                yield (
                    f"model.{name}: the checkpoint {self.checkpoint} is of a model with {value!r}, "
                    f"and {wanted.get(name)!r} would be another; leave it out"
                )


def find_base(source: str, recipe: "Recipe") -> Base:
    """Find the checkpoint that a user's path means.

    Args:
        source: A run or a checkpoint, as ``--from`` has it.
        recipe: What is to be trained.

    Raises:
        UsageError: There is none, or it is of another kind of model than the recipe's.
    """
    from bridge.training.checkpoint.manifest import refuse_damage
    from bridge.training.config.schema.fields import TARGET, class_name
    from bridge.training.config.schema.yaml12 import load_yaml
    from bridge.training.run_files.configuration import read_config_text
    from bridge.training.run_files.directory import find_checkpoint

    checkpoint = Path(os.path.abspath(find_checkpoint(source, "--from")))
    refuse_damage(checkpoint)
    path = checkpoint / "config.yaml"
    remedy = "it tells what the model is: give a checkpoint with its config.yaml"
    saved = load_yaml(read_config_text(path, remedy, may_lack_end=True))
    model = saved.get("model")
    if not isinstance(model, dict):
        raise UsageError(f"{path}: has no section model; {remedy}")
    wanted = class_name(type(recipe().model))
    if model.get(TARGET) != wanted:
        raise UsageError(
            f"--from: {checkpoint} is a {model.get(TARGET)}, and the recipe {recipe.name} trains a "
            f"{wanted}; choose a recipe for that model (`bridge recipes`)"
        )
    tokenizer = saved.get("tokenizer")
    return Base(
        checkpoint,
        _decided_by_checkpoint(model),
        tokenizer if tokenizer and tokenizer.get("type") != "null" else None,
    )


def _decided_by_checkpoint(section: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Leave out the fields that the recipe decides; sections of several modules have their own."""
    kept: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{place}{name}"
        if isinstance(value, dict):
            decided = _decided_by_checkpoint(value, f"{path}.")
            # A section of which all is the recipe's is not to be compared as an empty one.
            kept |= {name: decided} if decided or not value else {}
        elif not any(part in path for part in (*FREE_MODEL_FIELDS, *_RECIPE_FIELDS)):
            kept[name] = value
    return kept
