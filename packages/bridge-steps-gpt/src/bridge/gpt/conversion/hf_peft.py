"""Export of trained adapters to the format of Hugging Face's peft; the exporter ``hf-peft``."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bridge.gpt.conversion.hf_export import exported_model
from bridge.gpt.conversion.json_files import write_json
from bridge.gpt.conversion.safetensors_files import write_file
from bridge.training.contracts import AdaptedLayer, ExportedWeight, ExportRequest, LowRankUpdate
from bridge.training.merging import adapted_model
from bridge.training.usage_error import UsageError

_PREFIX = "base_model.model."


def export_hf_peft(request: ExportRequest) -> str:
    """Write a folder that ``peft.PeftModel.from_pretrained`` loads on top of the exported base.

    One update may change rows that are several modules there, such as queries, keys and values.
    Each of these modules gets its rows of B and the same A.

    Args:
        request: What to export, and how; the tensors are written to one file.

    Raises:
        UsageError: The checkpoint has no adapters, or the model belongs to no family.
    """
    exported_model(request, "hf-peft")
    with adapted_model(request.checkpoint, request.config, adapters_alone=True) as adapted:
        resolved: Any = adapted.config.model
        weights = resolved.exported_weights()
        found = [
            (module, update, part)
            for layer in adapted.layers
            for update in layer.low_rank_updates()
            for module, part in _modules_of_update(layer, update, weights)
        ]
        tensors = dict(_low_rank_tensors(found, request.dtype))
        write_file(request.output / "adapter_model.safetensors", tensors)
        modules = [module for module, _, _ in found]
        _, first, _ = found[0]
        write_json(
            request.output / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": adapted.base,
                "r": first.a.shape[0],
                "lora_alpha": first.scale * first.a.shape[0],
                "lora_dropout": getattr(adapted.method, "dropout", 0.0),
                "use_dora": first.magnitude is not None,
                "target_modules": _target_modules(modules, weights),
                "bias": "none",
                "inference_mode": True,
            },
        )
    return f"adapters of {len(modules)} layers, rank {first.a.shape[0]}"


def _modules_of_update(
    layer: AdaptedLayer, update: LowRankUpdate, weights: Mapping[str, ExportedWeight]
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield peft's modules that an update changes, each with its rows of B (None: all).

    Raises:
        UsageError: The layer has no counterpart in Hugging Face's format.
    """
    weight = weights.get(f"{layer.name}.weight")
    if weight is None:
        raise UsageError(
            f"--to hf-peft: {layer.name} has no counterpart in Hugging Face's format; leave it out "
            "with peft.exclude_modules, or merge the adapters (bridge merge)"
        )
    for name, rows in weight.parts.items():
        module = name.removesuffix(".weight")
        if update.rows is None:
            yield module, rows
        elif rows is not None and torch.equal(rows, update.rows):
            yield module, None


def _low_rank_tensors(
    found: list[tuple[str, LowRankUpdate, torch.Tensor | None]], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for module, update, rows in found:
        parts = {"lora_A.weight": update.a, "lora_B.weight": _select_rows(update.b, rows)}
        if update.magnitude is not None:
            parts["lora_magnitude_vector"] = _select_rows(update.magnitude, rows)
        for name, tensor in parts.items():
            # A copy, because safetensors rejects tensors that share memory, as an A here may.
            copied = tensor.detach().to(dtype or tensor.dtype, copy=True)
            yield f"{_PREFIX}{module}.{name}", copied.contiguous()


def _select_rows(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor[rows]


def _target_modules(modules: list[str], weights: Mapping[str, ExportedWeight]) -> list[str]:
    """Return the modules' last names, or their full names where a last name means others too."""
    names = [name for weight in weights.values() for name in weight.parts]
    everywhere = {name.removesuffix(".weight") for name in names}
    short = {module.rpartition(".")[2] for module in modules}
    meant = {module for module in everywhere if module.rpartition(".")[2] in short}
    return sorted(short if meant == set(modules) else modules)
