"""The checkpoint that ``bridge finetune --from`` starts from.

It decides what the model is and which tokenizer goes with it; the recipe and the user decide how
the model is executed, divided over ranks and regularized.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.contracts import Recipe


@dataclass(frozen=True)
class StartingCheckpoint:
    """A checkpoint, and what it decides of the run that starts from it."""

    path: Path
    """Its directory, absolute: the run does not depend on the command's working directory."""
    model: dict[str, Any]
    """The fields of its model section that say what the model is."""
    tokenizer: dict[str, Any] | None
    """Its tokenizer's section; None if the run had none for text."""

    @property
    def document(self) -> str:
        """A YAML document that puts the model and its tokenizer on a recipe."""
        from bridge.training.config.schema.yaml12 import dump_yaml

        sections = {"model": self.model, "tokenizer": self.tokenizer}
        return dump_yaml({name: section for name, section in sections.items() if section})


def find_starting_checkpoint(source: str, recipe: "Recipe") -> StartingCheckpoint:
    """Find the checkpoint that a user's path means.

    Args:
        source: A run or a checkpoint, as ``--from`` has it.
        recipe: The recipe to train.

    Raises:
        UsageError: There is none, or it is of another kind of model than the recipe's.
    """
    from bridge.training.checkpoint.resume_rules import decided_by_checkpoint
    from bridge.training.checkpoint.verification import reject_damaged
    from bridge.training.config.model_identity import field_kinds
    from bridge.training.config.schema.fields import TARGET, class_name
    from bridge.training.run_files.configuration import read_config
    from bridge.training.run_files.directory import find_checkpoint

    checkpoint = Path(os.path.abspath(find_checkpoint(source, "--from")))
    reject_damaged(checkpoint)
    path = checkpoint / "config.yaml"
    remedy = "it says what the model is; give a checkpoint with its config.yaml"
    saved = read_config(path, remedy, may_lack_end=True)
    model = saved.get("model")
    if not isinstance(model, dict):
        raise UsageError(f"{path}: has no section model; {remedy}")
    cls = type(recipe().model)
    wanted = class_name(cls)
    if model.get(TARGET) != wanted:
        raise UsageError(
            f"--from: {checkpoint} is a {model.get(TARGET)}, and the recipe {recipe.name} trains a "
            f"{wanted}; choose a recipe for that model (`bridge recipes`)"
        )
    tokenizer = saved.get("tokenizer")
    return StartingCheckpoint(
        checkpoint,
        decided_by_checkpoint(model, field_kinds(cls)),
        tokenizer if tokenizer and tokenizer.get("type") != "null" else None,
    )
