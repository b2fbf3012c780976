"""Model families: for each, its architecture in Hugging Face's format, its config and its weights.

A new family is a file here and a line in `FAMILIES`. A family that differs from Llama in more than
the fields of `LlamaLike` overrides its methods.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.gpt.families.llama import LLAMA
from bridge.gpt.families.llama_like import LlamaLike
from bridge.gpt.families.qwen3 import QWEN3
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.gpt.model_config import GPTModelConfig

FAMILIES = (LLAMA, QWEN3)

_SUPPORTED = " and ".join(f"{family.architecture} ({family.models})" for family in FAMILIES)


def find_family(model: "GPTModelConfig") -> LlamaLike:
    """Return the family that a model of ours belongs to.

    Raises:
        UsageError: It belongs to none; the message has a line for each field that differs.
    """
    family = next((family for family in FAMILIES if family.resembles(model)), LLAMA)
    if problems := list(family.problems_of_model(model)):
        raise UsageError(
            f"the model has no counterpart among {_SUPPORTED}:\n  " + "\n  ".join(problems)
        )
    return family


def find_family_of_config(values: Mapping[str, Any], path: Path) -> LlamaLike:
    """Return the family of the model that a config.json describes.

    Args:
        values: The content of config.json.
        path: The file, for messages.

    Raises:
        UsageError: Its architecture is not supported, or something in it is not; the message has
            a line for each.
    """
    architectures = values.get("architectures") or []
    by_architecture = {family.architecture: family for family in FAMILIES}
    family = next((by_architecture[a] for a in architectures if a in by_architecture), None)
    if family is None:
        model_type = values.get("model_type")
        named = ", ".join(architectures) or f"no architecture (model_type {model_type!r})"
        raise UsageError(f"{path}: {named} is not supported; supported are {_SUPPORTED}")
    if problems := list(family.problems_of_config(values)):
        raise UsageError(
            f"{path}: this {family.architecture} is not supported:\n  " + "\n  ".join(problems)
        )
    return family
