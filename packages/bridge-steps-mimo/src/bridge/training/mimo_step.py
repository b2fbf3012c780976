"""The forward step of multimodal models, whatever modules a rank holds.

A microbatch is a dict of host tensors:

- ``input_ids``, ``position_ids``, ``labels`` and ``loss_mask`` (not zero where the prediction
  counts), each [batch, sequence];
- ``modality_inputs``: ``{modality: {encoder: {argument: tensor}}}``, the items of all samples one
  after the other. A modality of which the microbatch has no item is absent;
- ``packing_kwargs`` for packed samples (`bridge.mimo.data.packing.pack`).

A rank reads the inputs of the stages that it holds (the model's ``role``):

    first stage of an encoder              its inputs
    last stage of an encoder               input_ids, to count the embeddings of each sample
    first stage of the language model      input_ids and position_ids
    last stage of the language model       labels and loss_mask
    every stage of the language model      packing_kwargs
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bridge.training.losses import masked_token_loss
from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.models.mimo.config.role import (
        MIMO_LANGUAGE_MODULE_KEY,
        ModuleLayout,
        RankRole,
    )
    from megatron.core.utils import unwrap_model

if TYPE_CHECKING:
    from bridge.training.state import GlobalState

KEYS = ("input_ids", "labels", "loss_mask", "position_ids", "modality_inputs", "packing_kwargs")
"""The keys of a microbatch; `get_batch` skips others."""


def forward_step(
    state: "GlobalState",
    data_iterator: Iterator[Mapping[str, Any]] | None,
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, Callable[..., Any] | None]:
    """Run one microbatch through the modules of this rank.

    Args:
        state: The state of the run.
        data_iterator: This rank's microbatches; None where its modules need none.
        model: The model, as wrapped for training.
        return_schedule_plan: Not supported: megatron-core has no schedule plan for these models.

    Returns:
        On the last stage of the language model the losses of the tokens, [batch, sequence], and
        their loss function. On other ranks the output of each module by its name, and None.

    Raises:
        UsageError: The microbatch lacks an input of the modules on this rank, the model's output is
            no tensor where it must be one, or `return_schedule_plan` is true. The message names
            module, stage and rank.
    """
    if return_schedule_plan:
        raise UsageError(
            "return_schedule_plan: a multimodal model has no schedule plan; set "
            "model.language.overlap_moe_expert_parallel_comm=false"
        )
    role: RankRole = unwrap_model(model).role
    state.timers("batch-generator", log_level=2).start()
    values = read_inputs(data_iterator, model)
    state.timers("batch-generator").stop()
    output, loss_mask = model(**values)
    if not role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY):
        return output, None
    if not isinstance(output, torch.Tensor):
        kind = f"a dict ({', '.join(output)})" if isinstance(output, Mapping) else f"{output!r}"
        raise UsageError(
            f"rank {_rank()}, {_stage(MIMO_LANGUAGE_MODULE_KEY, 'last')}: the model returned "
            f"{kind}; where the language model ends it must return the tokens' losses, or their "
            "mean, as a tensor"
        )
    # A model that splits the sequence for context parallelism splits the mask as well.
    return output, partial(loss_func, values["loss_mask"] if loss_mask is None else loss_mask)


def read_inputs(
    data_iterator: Iterator[Mapping[str, Any]] | None, model: torch.nn.Module
) -> dict[str, Any]:
    """Read a microbatch, and return the model's arguments on this rank.

    Args:
        data_iterator: As for `forward_step`. Nothing is read from it if this rank needs no input.
        model: The model, as wrapped for training.

    Raises:
        UsageError: The microbatch lacks an input of the modules on this rank.
    """
    inner: Any = unwrap_model(model)
    role: RankRole = inner.role
    required, wanted = _required_keys(role), _wanted_keys(role)
    values: dict[str, Any] = dict.fromkeys(KEYS)
    if not wanted:
        return values
    sample = None if data_iterator is None else next(data_iterator, None)
    if sample is None and not required:
        return values
    values |= _select_required(sample, required, wanted)
    ending = [name for name in role.modality_module_names if role.is_last_stage(name)]
    if role.mode is ModuleLayout.NON_COLOCATED and sample is not None and ending:
        values["embeddings_per_sample"] = {
            name: _embeddings_per_sample(sample, name, inner.special_token_ids[name])
            for name in ending
        }
        if not any(role.is_first_stage(name) for name in role.modules):
            # The host has counted them; the device needs none.
            values["input_ids"] = None
    moved: dict[str, Any] = _move_to_device(values, torch.cuda.current_device())
    return moved


def loss_func(
    loss_mask: torch.Tensor | None, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses of the counted tokens.

    Args:
        loss_mask: Not zero where a token counts, [batch, sequence].
        output_tensor: The tokens' losses in nats, in the shape of the mask; or one number, the
            mean of the counted losses.

    Returns:
        The sum (float32 scalar), the number of tokens (int32 scalar) and
        ``{"lm loss": [sum, number]}``.

    Raises:
        UsageError: There is no mask, the output is no tensor, or the shapes do not match.
    """
    if not isinstance(output_tensor, torch.Tensor):
        raise UsageError(
            f"output_tensor: got {type(output_tensor).__name__}; give the tokens' losses, or their "
            "mean, as a tensor"
        )
    if loss_mask is not None and output_tensor.dim() == 0:
        output_tensor = output_tensor.expand(loss_mask.shape)
    return masked_token_loss(loss_mask, output_tensor)


def get_batch(
    data_iterator: Iterator[Mapping[str, Any]] | None, *, keys: Collection[str] = KEYS
) -> dict[str, Any] | None:
    """Read the next microbatch and move it to the device, without a host-device sync.

    Args:
        data_iterator: Microbatches of tensors on the host, pinned where the device is a GPU.
        keys: The keys that this rank needs, of `KEYS`.

    Returns:
        The microbatch with those of the `keys` that it has; None if there is no iterator or it is
        exhausted.
    """
    sample = None if data_iterator is None else next(data_iterator, None)
    if sample is None:
        return None
    moved: dict[str, Any] = _move_to_device(_select(sample, keys), torch.cuda.current_device())
    return moved


def _select(sample: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: sample[key] for key in keys if sample.get(key) is not None}


def _required_keys(role: RankRole) -> dict[str, tuple[str, ...]]:
    """Return the required keys of each stage on this rank that reads any.

    A modality's inputs are never required: a microbatch may be text alone.
    """
    required: dict[str, tuple[str, ...]] = {}
    for name in role.modality_module_names:
        if role.is_first_stage(name):
            required[_stage(name, "first")] = ("input_ids",)
        elif role.is_last_stage(name):
            required[_stage(name, "last")] = ("input_ids",)
    if role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
        required[_stage(MIMO_LANGUAGE_MODULE_KEY, "first")] = ("input_ids", "position_ids")
    if role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY):
        required[_stage(MIMO_LANGUAGE_MODULE_KEY, "last")] = ("labels", "loss_mask")
    return required


def _wanted_keys(role: RankRole) -> set[str]:
    wanted = {key for keys in _required_keys(role).values() for key in keys}
    if any(role.is_first_stage(name) for name in role.modality_module_names):
        wanted.add("modality_inputs")
    if role.has_language_module:
        wanted.add("packing_kwargs")
    return wanted


def _embeddings_per_sample(sample: Mapping[str, Any], name: str, token: int) -> list[int]:
    """Count the embeddings of each sample, on the host."""
    counts = (sample["input_ids"] == token).sum(dim=1)
    items = sample.get("item_counts", {}).get(name)
    if items is not None and counts.numel() != items.numel():
        # Packed samples are in one row. Every item has the same number of embeddings.
        counts = items * (counts.sum() // items.sum().clamp(min=1))
    embeddings: list[int] = counts.tolist()
    return embeddings


def _select_required(
    sample: Mapping[str, Any] | None,
    required: Mapping[str, Collection[str]],
    wanted: Collection[str],
) -> dict[str, Any]:
    """Return the wanted keys of a microbatch.

    Raises:
        UsageError: It lacks a required one.
    """
    if sample is None:
        raise UsageError(
            f"rank {_rank()}, {' and '.join(required)}: there is no microbatch (no data iterator, "
            "or it is exhausted); give this rank an iterator over its microbatches"
        )
    batch = _select(sample, wanted)
    for stage, keys in required.items():
        missing = [key for key in keys if key not in batch]
        if missing:
            raise UsageError(
                f"rank {_rank()}, {stage}: the microbatch has no {' and no '.join(missing)} (it "
                f"has {', '.join(batch) or 'nothing else'}); a dataset for mimo_step gives "
                f"{', '.join(KEYS)}"
            )
    return batch


def _stage(module: str, which: str) -> str:
    return f"{which} stage of {module}"


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _move_to_device(value: Any, device: Any) -> Any:
    """Return a nested structure with its tensors moved to a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _move_to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move_to_device(item, device) for item in value)
    return value
