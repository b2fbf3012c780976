"""The optimizer's part of a checkpoint: corrections to megatron-core's state, and resharding.

megatron-core has one optimizer for all weights, and a second one for the experts under expert
parallelism. The tensors of a checkpoint are found by the names of their weights. The settings of
the parameter groups and the number of steps are saved for each optimizer.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch

from bridge.training.usage_error import UsageError

_RATES = ("max_lr", "min_lr")


@contextlib.contextmanager
def offsets_without_padding(optimizer: Any) -> Iterator[None]:
    """Remove the padding between buckets from the distributed optimizer's offsets in the block.

    DistributedOptimizer.sharded_param_state_fully_reshardable gathers the state of a gradient
    buffer without the padding at the end of its buckets, and slices it with the parameters' offsets
    in the padded buffer. With buckets [a a a . | b b .] it slices b from 4 on, and b begins at 3.
    So it saves the state of other parameters, and zeros after the end. This is fixed in
    megatron-core after 0.19.2 (https://github.com/NVIDIA/Megatron-LM/pull/5077). Loading goes by
    parameter and is right.

    Args:
        optimizer: megatron-core's optimizer, of any kind.
    """
    buffers = [buffer for part in _single_optimizers(optimizer) for buffer in _buffers_of(part)]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        buffer.param_index_map = _without_padding(buffer)
    try:
        yield
    finally:
        for buffer, offsets in zip(buffers, padded, strict=True):
            buffer.param_index_map = offsets


def let_sgd_be_loaded(optimizer: Any) -> None:
    """Set the function that makes the state of SGD, which megatron-core calls before loading.

    It has none for SGD, and raises (megatron-core 0.19.2, optimizer/__init__.py).

    Args:
        optimizer: megatron-core's optimizer, of any kind.
    """
    for single in _single_optimizers(optimizer):
        if isinstance(single.optimizer, torch.optim.SGD):
            single.init_state_fn = _make_momentum


def make_state(optimizer: Any) -> None:
    """Make the initial state of weights that were never updated.

    Without it megatron-core cannot save while every step was skipped, and raises.

    Args:
        optimizer: megatron-core's optimizer, of any kind.
    """
    for single in _single_optimizers(optimizer):
        if single.optimizer is None or single.init_state_fn is None:
            continue
        single.init_state_fn(single.optimizer, single.config)
        if isinstance(single.optimizer, torch.optim.Adam | torch.optim.AdamW):
            # Adam of megatron-core and of Transformer Engine counts steps by group.
            for state in single.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _make_momentum(sgd: torch.optim.Optimizer, _: Any) -> None:
    """Make the state of SGD."""
    for group in sgd.param_groups:
        for weight in group["params"] if group["momentum"] else []:
            sgd.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))


def is_shifted(optimizer: Any, state: Any) -> bool:
    """Whether a loaded state of the distributed optimizer has the weights of other parameters.

    The state has the weights in float32, which round to those of the model. Where it was saved
    without `offsets_without_padding`, they do not.

    Args:
        optimizer: megatron-core's optimizer, over a model that has the checkpoint's weights.
        state: Its loaded state, with one entry for each chained optimizer (`fit_to`).
    """
    return any(
        not _rounds_to(weight, loaded["param_state"][index]["param"])
        for part, loaded in _single_states(optimizer, state)
        for index, weight in enumerate(
            weight for buffer in _buffers_of(part) for weight in buffer.param_index_map
        )
    )


def take_saved_rates(
    groups: list[dict[str, Any]], state: Any, *, saved: float, present: float
) -> None:
    """Set the highest and lowest rates of parameter groups to those that were saved.

    megatron-core finds the saved settings of a group by its rates and other fields.

    Args:
        groups: The optimizer's, changed in place.
        state: Its loaded state.
        saved: Highest rate of the LR scheduler when the state was saved.
        present: Highest rate of the present scheduler; groups' rates keep their ratio to it.

    Raises:
        UsageError: No saved group has such a rate.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    others = set(param_group_identifier_keys) - {*_RATES, "is_expert_parallel"}
    known = list(_groups_in(state))
    for group in groups:
        highest = group.get("max_lr")
        if highest is None:
            continue
        alike = [s for s in known if all(s.get(name) == group.get(name) for name in others)]
        candidates = [highest * saved / present, highest] if present else [highest]
        rates = next(
            (
                {name: s.get(name) for name in _RATES}
                for rate in candidates
                for s in alike
                if s.get("max_lr") is not None and math.isclose(s["max_lr"], rate)
            ),
            None,
        )
        if rates is None:
            were = sorted({s["max_lr"] for s in known if s.get("max_lr") is not None})
            raise UsageError(
                f"optimizer.lr: some parameters learn at {highest} at most, and the checkpoint has "
                f"none that did ({', '.join(map(str, were))}); undo the overrides of "
                "optimizer.decoupled_lr and of other rates of single parameters, or start a new "
                "run from its weights with checkpoint.pretrained_checkpoint"
            )
        group.update(rates)


def fit_to(optimizer: Any, state: Any) -> Any:
    """Return a loaded state with one entry for each chained optimizer.

    Args:
        optimizer: megatron-core's optimizer, of the layout that loads.
        state: Its loaded state: the tensors of this layout, and the rest as it was saved, under
            a layout of more or fewer optimizers. Unchanged where their numbers are equal.

    Raises:
        UsageError: The checkpoint has no settings for a group of parameters, or it is not of the
            distributed optimizer.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    if not isinstance(optimizer, ChainedOptimizer):
        return state
    parts = optimizer.chained_optimizers
    saved = [state] if _is_part(state) else [state[key] for key in _integer_keys(state)]
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
    others = {
        name: value
        for name, value in saved[0].items()
        if isinstance(name, str) and name not in ("optimizer", "param_state")
    }
    fitted = [
        {
            **others,
            "optimizer": {
                "param_groups": [_settings_of(group, groups) for group in part.param_groups]
            },
            "param_state": tensors["param_state"],
        }
        for part, tensors in zip(parts, wanted, strict=True)
    ]
    return fitted[0] if len(parts) == 1 else dict(enumerate(fitted))


def _single_optimizers(optimizer: Any) -> list[Any]:
    """Return the single optimizers that an optimizer consists of."""
    parts = getattr(optimizer, "chained_optimizers", None)
    if parts is None and hasattr(optimizer, "module_infos"):
        parts = [info.optimizer for info in optimizer.module_infos.values() if info.optimizer]
    if parts is None:
        return [optimizer]
    return [single for part in parts for single in _single_optimizers(part)]


def _single_states(optimizer: Any, state: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield each optimizer of `_single_optimizers` with its part of a state."""
    parts = getattr(optimizer, "chained_optimizers", None)
    if hasattr(optimizer, "module_infos"):
        for name, info in optimizer.module_infos.items():
            if info.optimizer:
                yield from _single_states(info.optimizer, state[name])
    elif parts is None:
        yield optimizer, state
    elif len(parts) == 1:
        yield from _single_states(parts[0], state)
    else:
        for index, part in enumerate(parts):
            yield from _single_states(part, state[index])


def _buffers_of(single: Any) -> list[Any]:
    """Return the gradient buffers of a distributed optimizer; none of another one."""
    return getattr(single, "buffers", [])


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Return the offsets of a buffer's parameters if its buckets had no padding at their ends."""
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = list(accumulate(padding, initial=0))
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _rounds_to(weight: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether a weight is what a float32 tensor of its shape becomes in the weight's type."""
    precision = torch.finfo(weight.dtype).eps
    return torch.allclose(
        weight.detach().float().cpu(), exact.float().cpu(), rtol=precision, atol=0.0
    )


def _groups_in(state: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of all groups that a state holds."""
    for key, part in state.items():
        # megatron-core's MimoOptimizer keeps them under a name of its own.
        if str(key).removeprefix("_mimo_").startswith("param_groups"):
            yield from part
        elif isinstance(part, Mapping):
            yield from _groups_in(part)


def _integer_keys(state: Mapping[Any, Any]) -> list[int]:
    return sorted(key for key in state if isinstance(key, int))


def _is_part(state: Mapping[Any, Any]) -> bool:
    """Whether a state has the settings that one optimizer saves next to its tensors."""
    return "optimizer" in state or "param_groups" in state


def _settings_of(group: Mapping[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the saved settings of a group's parameters."""
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
