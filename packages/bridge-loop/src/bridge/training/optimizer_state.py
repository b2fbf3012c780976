"""The optimizer's part of a checkpoint, fitted to another layout of the experts.

megatron-core keeps one optimizer for all weights, or a second one for the experts where they are
spread over ranks. The tensors of a checkpoint are found by the names of their weights; what stands
beside them, the settings of the parameter groups and the number of steps, stands by optimizer.
"""

from collections.abc import Mapping
from typing import Any

from bridge.training.usage_error import UsageError


def fitted_to(optimizer: Any, state: Any) -> Any:
    """Return a loaded state with one part for each of an optimizer's parts.

    Args:
        optimizer: megatron-core's optimizer, of the layout that loads.
        state: What was loaded for it: the tensors as it asked for them, and the rest as it was
            saved under a layout of more or fewer optimizers. Left as it is where both are one.

    Raises:
        UsageError: The checkpoint has no settings for a group of parameters, or it is not of the
            distributed optimizer.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    if not isinstance(optimizer, ChainedOptimizer):
        return state
    parts = optimizer.chained_optimizers
    saved = [state] if _is_part(state) else [state[key] for key in _numbers(state)]
    if len(saved) == len(parts) and all(map(_is_part, saved)):
        return state
    wanted = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    if not all("param_state" in part for part in wanted):
        raise UsageError(
            "ddp.use_distributed_optimizer=false: the state of such an optimizer does not go from "
            "experts on all ranks to experts spread over them, or back; continue with the "
            "model.expert_model_parallel_size that the checkpoint was saved with"
        )
    saved = [part for part in saved if _is_part(part)]
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    beside = {
        name: value
        for name, value in saved[0].items()
        if isinstance(name, str) and name not in ("optimizer", "param_state")
    }
    fitted = [
        {
            **beside,
            "optimizer": {
                "param_groups": [_settings_of(group, groups) for group in part.param_groups]
            },
            "param_state": tensors["param_state"],
        }
        for part, tensors in zip(parts, wanted, strict=True)
    ]
    return fitted[0] if len(parts) == 1 else dict(enumerate(fitted))


def _numbers(state: Mapping[Any, Any]) -> list[int]:
    return sorted(key for key in state if isinstance(key, int))


def _is_part(state: Mapping[Any, Any]) -> bool:
    """Tell whether a state has what one optimizer saves beside tensors."""
    return "optimizer" in state or "param_groups" in state


def _settings_of(group: Mapping[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the saved settings of the parameters that a group holds."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    mark = "is_expert_parallel"
    names = [name for name in param_group_identifier_keys if name != mark]
    alike = [s for s in saved if all(s.get(name) == group.get(name) for name in names)]
    if not alike:
        raise UsageError(
            "the checkpoint has no optimizer settings for parameters with "
            + ", ".join(f"{name}={group.get(name)!r}" for name in names)
            + "; continue it under the layout that it was saved with"
        )
    found = next((s for s in alike if s.get(mark) == group.get(mark)), alike[0])
    return {**found, mark: group.get(mark)}
