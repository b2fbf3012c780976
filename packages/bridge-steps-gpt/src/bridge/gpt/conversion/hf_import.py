"""Import of a model in Hugging Face's format, as a checkpoint that runs start from."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bridge.gpt.conversion.hf_config import read_model_config
from bridge.gpt.conversion.safetensors_files import TensorFolder
from bridge.gpt.conversion.tokenizer_files import has_tokenizer
from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.model_config import GPTModelConfig
from bridge.gpt.name_lists import join_first
from bridge.training.checkpoint_weights import write_weights
from bridge.training.config import ConfigContainer, TokenizerConfig
from bridge.training.contracts import ExportedWeight
from bridge.training.ranks.groups import one_process
from bridge.training.run_files.output_folder import new_folder
from bridge.training.usage_error import UsageError


def import_hf(directory: Path, checkpoint: Path, *, dtype: torch.dtype | None = None) -> str:
    """Make a checkpoint of a model in Hugging Face's format, for any parallel layout to load.

    Its config.yaml has the model section, and a tokenizer section if the folder has a tokenizer.
    The model is held in memory once.

    Args:
        directory: The folder with config.json and the safetensors files.
        checkpoint: Must not exist; it is there only once it is complete.
        dtype: Type of the weights; None keeps theirs.

    Returns:
        A line that says what was written.

    Raises:
        UsageError: The architecture is not supported, the files do not hold that model, or
            `checkpoint` exists.
    """
    model = read_model_config(directory)
    tokenizer = None
    if has_tokenizer(directory):
        tokenizer = TokenizerConfig(type="huggingface", model=str(directory.resolve()))
    config = ConfigContainer(model=model, dataset=GPTDatasetConfig(), tokenizer=tokenizer)
    with new_folder(checkpoint, "--output") as folder, one_process():
        weights = read_weights(directory, model, dtype)
        write_weights(folder, weights, config)
    parameters = sum(weight.numel() for weight in weights.values())
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    return f"wrote {checkpoint}: {parameters:,} parameters in {' and '.join(kinds)}"


def read_weights(
    directory: Path, model: GPTModelConfig, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Return every unsharded weight of a model by our names.

    Args:
        directory: The folder with the safetensors files.
        model: The model section that `read_model_config` returned for it.
        dtype: Type of the weights; None keeps theirs.

    Raises:
        UsageError: A tensor is missing, or there is one too many, or one has another shape.
    """
    expected = model.exported_weights()
    with TensorFolder(directory) as tensors:
        _check_tensors(tensors, expected, directory)
        return {
            name: weight.join({part: tensors.read(part).to(dtype) for part in weight.parts})
            for name, weight in expected.items()
        }


def _check_tensors(
    tensors: TensorFolder, weights: Mapping[str, ExportedWeight], directory: Path
) -> None:
    expected = {name: weight.shape_of(name) for weight in weights.values() for name in weight.parts}
    found = tensors.names()
    if missing := sorted(expected.keys() - found):
        raise UsageError(
            f"{directory}: the files have no {join_first(missing)}, which config.json asks for"
        )
    # Older files hold the rotary frequencies, which follow from config.json.
    surplus = {n for n in found - expected.keys() if not n.endswith(".rotary_emb.inv_freq")}
    if "lm_head.weight" in surplus:
        _check_tied(tensors, directory)
        surplus.remove("lm_head.weight")
    if surplus:
        raise UsageError(
            f"{directory}: the files have {join_first(sorted(surplus))}, for which the model of "
            "config.json has no place"
        )
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            raise UsageError(
                f"{directory}: {name} has the shape {list(tensors.shape(name))}; by config.json it "
                f"is {list(shape)}"
            )


def _check_tied(tensors: TensorFolder, directory: Path) -> None:
    if not torch.equal(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")):
        raise UsageError(
            f"{directory}: lm_head.weight differs from model.embed_tokens.weight, and "
            "tie_word_embeddings is true; correct config.json"
        )
