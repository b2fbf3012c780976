"""Conversion between config.json in Hugging Face's format and our model section."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.gpt.conversion.json_files import read_json
from bridge.gpt.families import find_family, find_family_of_config
from bridge.gpt.families.rotary import ROPE_KEYS
from bridge.gpt.model_config import GPTModelConfig

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
# A recipe may train with other values, which do not change what the model is.
_TRAINING_KEYS = ("attention_dropout", "initializer_range")


def read_model_config(directory: str | Path) -> GPTModelConfig:
    """Return the model section for a folder in Hugging Face's format; no weight is read.

    The content of the folder's config.json is kept in ``hf_files``. The vocabulary is padded only
    where the tensor-parallel size does not divide it, so the model's losses are those of the
    original.

    Raises:
        UsageError: There is no config.json, or the architecture or something in it is not
            supported; the message names it, and what is.
    """
    folder = Path(directory)
    values = read_json(folder / CONFIG)
    model = _section_of(values, folder / CONFIG)
    model.hf_files = {CONFIG: json.dumps(values, ensure_ascii=False)}
    if (folder / GENERATION_CONFIG).exists():
        generation = read_json(folder / GENERATION_CONFIG)
        model.hf_files[GENERATION_CONFIG] = json.dumps(generation, ensure_ascii=False)
    return model


def config_json(
    model: GPTModelConfig, dtype: torch.dtype, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json for a model.

    For an imported model it is the original's, with what was changed since.

    Args:
        model: The model section.
        dtype: Type of the weights.
        known: The config.json next to the tokenizer, for a model that was not imported. If it is of
            a model of the same size, its ids of special tokens and its number of positions are
            taken, for which our section has no field.

    Raises:
        UsageError: The model belongs to no family.
    """
    values = find_family(model).config_json(model, dtype)
    if model.hf_files is not None:
        return _with_changes(json.loads(model.hf_files[CONFIG]), values, dtype)
    if any(known.get(name) != values[name] for name in _SIZES):
        return values
    return values | {name: known[name] for name in _KEPT if name in known}


def _section_of(values: Mapping[str, Any], path: Path) -> GPTModelConfig:
    family = find_family_of_config(values, path)
    return GPTModelConfig(**family.section_fields(values, path))


def _with_changes(
    original: dict[str, Any], values: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the imported config.json with the values in which the model differs from it.

    Args:
        original: The config.json that was imported.
        values: The config.json of the model as it is now.
        dtype: Type of the weights.
    """
    imported_model = _section_of(original, Path(CONFIG))
    imported = find_family(imported_model).config_json(imported_model, dtype)
    changes = {
        name: value
        for name, value in values.items()
        if name not in _TRAINING_KEYS and value != imported.get(name)
    }
    # A sample may be shorter than the positions that the model knows.
    positions = max(original["max_position_embeddings"], values["max_position_embeddings"])
    kept = dict(original)
    if not changes.keys().isdisjoint(ROPE_KEYS):
        # The original may describe the rotary embedding by the keys of newer files.
        kept = {name: value for name, value in kept.items() if name not in ROPE_KEYS}
        changes |= {name: values[name] for name in ("rope_theta", "rope_scaling")}
    changes["dtype" if "dtype" in original else "torch_dtype"] = values["torch_dtype"]
    return kept | changes | {"max_position_embeddings": positions}
