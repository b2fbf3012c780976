"""Models with frozen weights: their size, and gradients that reach every trained parameter.

A parameter trains if it requires gradients; its name does not matter.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from bridge.training.model.initial_weights import shards_of_parameters
from bridge.training.usage_error import UsageError


def trained_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters that train, by name in the chunk without its wrappers."""
    for name, parameter in unwrap_model(chunk).named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def only_trained(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return those entries of a module's sharded state dict that are parameters that train."""
    return {
        name: entry
        for name, entry in state.items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        and isinstance(entry.data, torch.nn.Parameter)
        and entry.data.requires_grad
    }


def load_trained(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Load the state of `only_trained`, and leave the rest of a module as it is.

    Args:
        module: The module.
        state: Its parameters that train; empty where none does.

    Raises:
        UsageError: The state lacks a parameter that trains, or has one that the module lacks.
    """
    # Unwrapped, as the 16-bit wrapper does not return the missing keys.
    found = unwrap_model(module).load_state_dict(state, strict=False)
    trained = dict(trained_parameters(module))
    if lacking := [*sorted(trained.keys() & set(found.missing_keys)), *found.unexpected_keys]:
        raise UsageError(f"the adapters differ from those that were saved: {', '.join(lacking)}")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameters of the model over all ranks; those that several ranks have count once."""

    total: int
    trained: int
    trained_per_token: float
    """Parameters that train and process one token: of experts, as many as it is routed to."""


def measure_model(
    model: Sequence[torch.nn.Module], pg_collection: ProcessGroupCollection
) -> ModelSize:
    """Count the parameters of all ranks; a collective."""
    counts = torch.zeros(3, dtype=torch.float64)
    for chunk in model:
        fractions = _fractions_of_experts(chunk)
        for parameter, shards in shards_of_parameters(unwrap_model(chunk), pg_collection):
            if all(_is_first_replica(shard) for shard in shards):
                trained = parameter.numel() * parameter.requires_grad
                per_token = trained * fractions.get(id(parameter), 1.0)
                counts += torch.tensor([parameter.numel(), trained, per_token], dtype=counts.dtype)
    counts = counts.to(next(model[0].parameters()).device)
    dist.all_reduce(counts)
    total, trained, per_token = counts.tolist()
    return ModelSize(total=round(total), trained=round(trained), trained_per_token=per_token)


def _fractions_of_experts(chunk: torch.nn.Module) -> dict[int, float]:
    """Return, by the parameter's id, the fraction of all tokens that an expert processes."""
    fractions: dict[int, float] = {}
    for experts in chunk.modules():
        if isinstance(experts, SequentialMLP):
            number = experts.num_local_experts * experts.ep_group.size()
            fraction = experts.config.moe_router_topk / number
            fractions |= {id(parameter): fraction for parameter in experts.parameters()}
    return fractions


def _is_first_replica(shard: ShardedTensor) -> bool:
    replica = shard.replica_id
    return not any(replica) if isinstance(replica, tuple) else not replica


@contextlib.contextmanager
def gradients_reach_recomputed_layers(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Make inputs of layers that are recomputed in the backward pass require gradients.

    megatron-core's recomputation gives gradients only where some input requires them. After a
    frozen embedding none does, so trained parameters in the layers would get no gradient, without
    an error. Therefore the first floating-point input of each module with trained parameters is
    made to require gradients.

    Args:
        model: The model chunks; those without frozen weights or without recomputation stay as they
            are.
    """
    handles = [
        module.register_forward_pre_hook(_require_gradients, with_kwargs=True)
        for chunk in model
        if _is_partly_frozen(chunk) and _recomputes(chunk)
        for module in chunk.modules()
        if any(parameter.requires_grad for parameter in module.parameters())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_partly_frozen(chunk: torch.nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in chunk.parameters())


def _recomputes(chunk: torch.nn.Module) -> bool:
    configs = (getattr(module, "config", None) for module in chunk.modules())
    return any(
        isinstance(config, TransformerConfig) and config.recompute_granularity is not None
        for config in configs
    )


def _require_gradients(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not torch.is_grad_enabled():
        return None
    given: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [
        (name, value)
        for name, value in given
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    if not tensors or any(value.requires_grad for _, value in tensors):
        return None
    name, value = tensors[0]
    # Another tensor on the same memory, as the caller may use this one elsewhere.
    opened = value.detach().requires_grad_()
    if isinstance(name, int):
        return (*args[:name], opened, *args[name + 1 :]), kwargs
    return args, {**kwargs, name: opened}


class GradientWatch:
    """The trained parameters that got no gradient yet in the first step."""

    def __init__(self, model: Iterable[torch.nn.Module]) -> None:
        """Watch every parameter of `model` that trains."""
        self._missing: dict[int, tuple[str, Any]] = {}
        for chunk in model:
            for name, parameter in trained_parameters(chunk):
                handle = parameter.register_hook(partial(self._seen, id(parameter)))
                self._missing[id(parameter)] = (name, handle)

    def check(self) -> None:
        """Raise if a trained parameter got no gradient, and stop watching.

        Raises:
            RuntimeError: The message has their names.
        """
        missing = [name for name, _ in self._missing.values()]
        for _, handle in self._missing.values():
            handle.remove()
        self._missing = {}
        if missing:
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise RuntimeError(
                f"{len(missing)} parameters that train got no gradient in the first step: {shown}. "
                "The loss does not depend on them, so they would stay as they are; leave them out "
                "of what trains (peft.exclude_modules), or use them in the forward step"
            )

    def _seen(self, key: int, gradient: torch.Tensor) -> None:
        if key in self._missing:
            _, handle = self._missing.pop(key)
            handle.remove()
