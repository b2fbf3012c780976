"""One step of megatron-core's optimizer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True, frozen=True)
class OptimizerStep:
    """The outcome of a step of the optimizer."""

    succeeded: bool
    """Whether the weights were changed."""
    grad_norm: "torch.Tensor | float | None" = None
    """L2 norm of the gradients before clipping."""
    zeros: int | None = None
    """Zeros in the gradients of all parameters, with optimizer.log_num_zeros_in_grad."""


def step_optimizer(optimizer: Any) -> OptimizerStep:
    """Step with the gradients in ``main_grad``.

    No rank steps after an overflow (fp16), or where the norm is above
    optimizer.grad_norm_skip_threshold.
    """
    succeeded, grad_norm, zeros = optimizer.step()
    # A rank without weights steps whatever the norm is.
    if succeeded and not _is_too_large(grad_norm, optimizer.config.grad_norm_skip_threshold):
        is_counted = optimizer.config.log_num_zeros_in_grad
        return OptimizerStep(
            succeeded=True, grad_norm=grad_norm, zeros=int(zeros or 0) if is_counted else None
        )
    _synchronize_scalers(optimizer)
    return OptimizerStep(succeeded=False)


def _synchronize_scalers(optimizer: Any) -> None:
    """Give all loss scalers of an fp16 optimizer the state of the one that found an overflow.

    megatron-core chains an optimizer for the experts to that for the other weights, each with a
    scaler. It multiplies the loss by the first one's scale and divides gradients by their own: with
    different scales the experts' gradients would be wrong from then on.
    """
    parts = getattr(optimizer, "chained_optimizers", ())
    scalers = [part.grad_scaler for part in parts if getattr(part, "grad_scaler", None)]
    if len(scalers) > 1:
        # They were equal before the step, and only an overflow lowers the count.
        found = min((scaler.state_dict() for scaler in scalers), key=_overflows_left)
        for scaler in scalers:
            scaler.load_state_dict(found)


def _is_too_large(grad_norm: "torch.Tensor | float | None", threshold: float) -> bool:
    # Without a threshold there is no host-device sync for the norm.
    return grad_norm is not None and math.isfinite(threshold) and bool(grad_norm > threshold)


def _overflows_left(scaler_state: Mapping[str, Any]) -> int:
    """Return the number of overflows that are left before a scaler lowers its scale."""
    return int(scaler_state.get("hysteresis_tracker", 0))
