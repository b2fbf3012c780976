"""Export of a checkpoint to Hugging Face's format; the exporter ``hf``."""

import json
from collections.abc import Iterator, Mapping

import torch

from bridge.gpt.conversion.hf_config import CONFIG, GENERATION_CONFIG, config_json
from bridge.gpt.conversion.json_files import read_json, write_json
from bridge.gpt.conversion.safetensors_files import write_tensors
from bridge.gpt.conversion.tokenizer_files import copy_tokenizer, tokenizer_folder
from bridge.gpt.model_config import GPTModelConfig
from bridge.training.checkpoint_weights import SavedWeights
from bridge.training.contracts import ExportedWeight, ExportRequest
from bridge.training.ranks.groups import one_process
from bridge.training.usage_error import UsageError


def export_hf(request: ExportRequest) -> str:
    """Write a folder that transformers and others load: config.json, safetensors, tokenizer.

    The weights are read one by one, and those of one file are held at a time. Our model section
    has no field for some of config.json, such as the ids of special tokens: these are the values
    that were imported with the model, or those in the tokenizer's folder if it is a model's.

    Args:
        request: What to export, and how.

    Raises:
        UsageError: The model belongs to no family, or the checkpoint does not hold it.
    """
    model = exported_model(request, "hf")
    if request.config.peft is not None:
        raise UsageError(
            f"--to hf: {request.checkpoint} holds adapters and not the model; export them with "
            f"--to hf-peft, or the merged model after `bridge merge {request.checkpoint} --output "
            "DIR`"
        )
    weights = model.exported_weights()
    source = tokenizer_folder(request.config.tokenizer)
    known = read_json(source / CONFIG) if source and (source / CONFIG).exists() else {}
    with one_process():
        saved = SavedWeights(request.checkpoint)
        for name, weight in weights.items():
            _check_shape(saved, name, weight, request)
        first = saved.dtype(next(iter(weights)))
        size, files = write_tensors(
            request.output,
            _read_tensors(saved, weights, request.dtype),
            max_shard_size=request.max_shard_size,
        )
    dtype = request.dtype or first
    write_json(request.output / CONFIG, config_json(model, dtype, known))
    generation = (model.hf_files or {}).get(GENERATION_CONFIG)
    copied = copy_tokenizer(source, request.output) if source else []
    if generation is not None and GENERATION_CONFIG not in copied:
        write_json(request.output / GENERATION_CONFIG, json.loads(generation))
    tokenizer = f"with {', '.join(copied)}" if copied else "without a tokenizer"
    if source and not source.is_dir():
        tokenizer += f" ({source} is not there any more)"
    return (
        f"{size / 1e9:.3g} GB in {files} file{'s' if files > 1 else ''}, "
        f"{str(dtype).removeprefix('torch.')}, {tokenizer}"
    )


def exported_model(request: ExportRequest, exporter: str) -> GPTModelConfig:
    """Return the model section of the checkpoint; other models than GPTs are rejected.

    Raises:
        UsageError: It is of another class.
    """
    model = request.config.model
    if not isinstance(model, GPTModelConfig):
        raise UsageError(
            f"--to {exporter}: {request.checkpoint} holds a {type(model).__name__}; only GPT "
            "models (GPTModelConfig) are exported"
        )
    return model


def _check_shape(
    saved: SavedWeights, name: str, weight: ExportedWeight, request: ExportRequest
) -> None:
    shape = saved.shape(name)
    if shape is None:
        raise UsageError(
            f"{request.checkpoint}: has no {name}, which the model of its config.yaml has"
        )
    # The vocabulary of the checkpoint may be padded.
    if shape[1:] != weight.shape[1:] or shape[0] < weight.shape[0]:
        raise UsageError(
            f"{request.checkpoint}: {name} has the shape {list(shape)}; by its config.yaml it is "
            f"{list(weight.shape)}"
        )


def _read_tensors(
    saved: SavedWeights, weights: Mapping[str, ExportedWeight], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in weights.items():
        for part, tensor in weight.split(saved.read(name)).items():
            yield part, tensor.to(dtype)
