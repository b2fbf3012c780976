"""The forward step of multimodal models, whatever modules a rank holds.

A microbatch is a dict of host tensors: ``input_ids`` and ``position_ids``, ``labels`` and
``loss_mask`` (not zero where the prediction counts), each [batch, sequence], and
``modality_inputs``: ``{modality: {encoder: {argument: tensor}}}``, the items of all samples of the
microbatch one after the other. A modality of which the microbatch has no item is left out.

A rank takes what the modules on it need, as the model's role says: a first stage of an encoder its
inputs, the first stage of the language model the tokens, its last stage labels and mask.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bridge.training.losses import masked_token_loss
from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, RankRole
    from megatron.core.utils import unwrap_model

if TYPE_CHECKING:
    from bridge.training.state import GlobalState

KEYS = ("input_ids", "labels", "loss_mask", "position_ids", "modality_inputs")
"""What a microbatch may hold; `get_batch` leaves anything else where it is."""


def forward_step(
    state: "GlobalState",
    data_iterator: Iterator[Mapping[str, Any]] | None,
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, Callable[..., Any] | None]:
    """Run one microbatch through the modules of this rank.

    Args:
        state: The state of the run.
        data_iterator: Yields this rank's microbatches; None where its modules need none.
        model: The model, as wrapped for training.
        return_schedule_plan: Not supported: megatron-core has no such plan for these models.

    Returns:
        Where the language model ends, the losses of the tokens, [batch, sequence], and their loss
        function. On other ranks the output of each module by its name, and None.

    Raises:
        ValueError: The microbatch lacks what the modules of this rank need, the output is not what
            this stage must give, or a plan was asked for. The message names module, stage and rank.
    """
    if return_schedule_plan:
        raise ValueError(
            "return_schedule_plan: a multimodal model has no schedule plan; set "
            "model.language.overlap_moe_expert_parallel_comm=false"
        )
    role: RankRole = unwrap_model(model).role
    required = _required_keys(role)
    state.timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, keys=_wanted_keys(role)) if required else {}
    state.timers("batch-generator").stop()
    values = dict.fromkeys(KEYS) | _checked(batch, required)
    output, loss_mask = model(**values)
    if not role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY):
        return output, None
    if not isinstance(output, torch.Tensor):
        kind = f"a dict ({', '.join(output)})" if isinstance(output, Mapping) else f"{output!r}"
        raise ValueError(
            f"rank {_rank()}, {_stage(MIMO_LANGUAGE_MODULE_KEY, 'last')}: the model returned "
            f"{kind}; where the language model ends it must return the tokens' losses, or their "
            "mean, as a tensor"
        )
    # A model that cut the sequence for context parallelism has cut the mask as well.
    return output, partial(loss_func, values["loss_mask"] if loss_mask is None else loss_mask)


def loss_func(
    loss_mask: torch.Tensor | None, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses of the tokens that count.

    Args:
        loss_mask: Not zero where a token counts, [batch, sequence].
        output_tensor: The tokens' losses in nats, in the shape of the mask; or one number, the
            mean of the losses that count.

    Returns:
        The sum (float32 scalar), the number of tokens (int32 scalar) and
        ``{"lm loss": [sum, number]}``.

    Raises:
        ValueError: There is no mask, or the shapes do not match.
    """
    if loss_mask is not None and output_tensor.dim() == 0:
        output_tensor = output_tensor.expand(loss_mask.shape)
    return masked_token_loss(loss_mask, output_tensor)


def get_batch(
    data_iterator: Iterator[Mapping[str, Any]] | None, *, keys: Collection[str] = KEYS
) -> dict[str, Any] | None:
    """Read the next microbatch and move it to the device; nothing waits for the copies.

    Args:
        data_iterator: Yields microbatches; tensors on the host, pinned where the device is a GPU.
        keys: Those that this rank needs, of `KEYS`.

    Returns:
        The microbatch, with the `keys` that it has and nothing else; None if there is no iterator
        or it is exhausted.
    """
    sample = None if data_iterator is None else next(data_iterator, None)
    if sample is None:
        return None
    device = torch.cuda.current_device()
    return {key: _moved(sample[key], device) for key in keys if sample.get(key) is not None}


def _required_keys(role: RankRole) -> dict[str, tuple[str, ...]]:
    """Return what the stages on this rank cannot do without; those that read nothing are absent.

    A modality's inputs are not among it: a microbatch may be text alone.
    """
    required: dict[str, tuple[str, ...]] = {}
    for name in role.modality_module_names:
        if role.is_first_stage(name):
            required[_stage(name, "first")] = ("input_ids",)
    if role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
        required[_stage(MIMO_LANGUAGE_MODULE_KEY, "first")] = ("input_ids", "position_ids")
    if role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY):
        required[_stage(MIMO_LANGUAGE_MODULE_KEY, "last")] = ("labels", "loss_mask")
    return required


def _wanted_keys(role: RankRole) -> set[str]:
    wanted = {key for keys in _required_keys(role).values() for key in keys}
    if any(role.is_first_stage(name) for name in role.modality_module_names):
        wanted.add("modality_inputs")
    return wanted


def _checked(
    batch: dict[str, Any] | None, required: Mapping[str, Collection[str]]
) -> dict[str, Any]:
    """Return the microbatch of this rank, or say what it lacks."""
    if batch is None:
        raise ValueError(
            f"rank {_rank()}, {' and '.join(required)}: there is no microbatch (no data iterator, "
            "or it is exhausted); give this rank an iterator over its microbatches"
        )
    for stage, keys in required.items():
        missing = [key for key in keys if key not in batch]
        if missing:
            raise ValueError(
                f"rank {_rank()}, {stage}: the microbatch has no {' and no '.join(missing)} (it "
                f"has {', '.join(batch) or 'nothing else'}); a dataset for mimo_step gives "
                f"{', '.join(KEYS)}"
            )
    return batch


def _stage(module: str, which: str) -> str:
    return f"{which} stage of {module}"


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _moved(value: Any, device: Any) -> Any:
    """Move the tensors of a nested structure."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
