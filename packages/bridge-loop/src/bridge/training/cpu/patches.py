"""The table of the CPU emulation: the functions of torch and megatron-core that it replaces."""

import contextlib
import datetime
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from torch.nn import functional

from bridge.training.megatron_import import quiet_import

with quiet_import():
    import megatron.core.jit
    import megatron.core.optimizer
    import megatron.core.optimizer.clip_grads
    import megatron.core.optimizer.distrib_optimizer
    import megatron.core.optimizer.optimizer
    import megatron.core.tensor_parallel.mappings
    import megatron.core.tensor_parallel.random
    import megatron.core.transformer.moe.moe_utils
    import megatron.core.transformer.moe.token_dispatcher
    import megatron.core.utils

from bridge.training.cpu.adam import FusedAdam
from bridge.training.cpu.random_streams import DeviceStream, dropout_from, make_tracker_class
from bridge.training.cpu.streams import CPU, Event, Stream

type Patch = tuple[Any, str, Any]
"""Owner (a module or a class), attribute, replacement."""


def table() -> Iterator[Patch]:
    """Yield the table: a module or class, the name in it, and the replacement."""
    yield from _stream_patches()
    yield from _device_patches()
    yield from _factory_patches()
    yield from _random_patches()
    yield from _optimizer_patches()
    yield from _compiler_patches()
    yield from _expert_patches()
    yield from _uneven_collective_patches()
    yield from _process_group_patches()


def _returning(result: Any = None) -> Callable[..., Any]:
    """Return a new function for a call that has no work to do on a CPU.

    TorchDynamo rejects one function under two names, so each name gets its own.
    """
    return lambda *args, **kwargs: result


def _stream_patches() -> Iterator[Patch]:
    """Streams, events: pipeline_parallel/utils.py, moe_layer.py, param_and_grad_buffer.py."""
    cuda, stream = torch.cuda, Stream()
    yield cuda, "Stream", Stream
    yield cuda, "Event", Event
    yield cuda, "stream", lambda stream: contextlib.nullcontext()
    yield cuda, "current_stream", lambda device=None: stream
    yield cuda, "default_stream", lambda device=None: stream
    yield cuda, "set_stream", _returning()
    yield cuda, "synchronize", _returning()
    yield cuda, "is_current_stream_capturing", lambda: False
    yield cuda.nvtx, "range_push", _returning()
    yield cuda.nvtx, "range_pop", _returning()
    yield torch.Tensor, "record_stream", _returning()


def _device_patches() -> Iterator[Patch]:
    """The current device (199 places in megatron-core), its memory, and moves to it."""
    cuda = torch.cuda
    yield cuda, "current_device", lambda: CPU
    yield cuda, "set_device", _returning()
    yield cuda, "empty_cache", _returning()
    yield cuda, "reset_peak_memory_stats", _returning()
    yield cuda, "memory_stats", lambda device=None: {}
    for name in ("memory_allocated", "memory_reserved"):
        yield cuda, name, _returning(0)
        yield cuda, f"max_{name}", _returning(0)
    yield torch.Tensor, "cuda", _self
    yield torch.Tensor, "pin_memory", _self
    yield torch.Tensor, "to", _to_cpu(torch.Tensor.to)


def _self(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _to_cpu(to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def to_cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        elif kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(tensor, *args, **kwargs)

    return to_cpu


_FACTORIES = (
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like rand rand_like "
    "randint randn randn_like randperm tensor zeros zeros_like"
).split()


def _factory_patches() -> Iterator[Patch]:
    """Functions called with device="cuda": schedules.py, clip_grads.py, grad_scaler.py, ..."""
    for name in _FACTORIES:
        yield torch, name, _on_cpu(getattr(torch, name))
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        yield torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # On the path of every call, so it does as little as it can.
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)  # pinning asks the driver
        return factory(*args, **kwargs)

    return on_cpu


def _random_patches() -> Iterator[Patch]:
    """The device's generator and the streams forked from it: tensor_parallel/random.py."""
    stream, cuda, tracked = DeviceStream(), torch.cuda, megatron.core.tensor_parallel.random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return stream.get_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        stream.set_state(new_state)

    for owner in (cuda, cuda.random):
        yield owner, "get_rng_state", get_state
        yield owner, "set_rng_state", set_state
        yield owner, "manual_seed", stream.manual_seed
        yield owner, "manual_seed_all", stream.manual_seed
    yield tracked, "_get_cuda_rng_state", get_state
    yield tracked, "_set_cuda_rng_state", set_state
    yield tracked, "CudaRNGStatesTracker", make_tracker_class(stream)
    # The present tracker belongs to what ran before; the emulation starts with a new one.
    yield tracked, "_CUDA_RNG_STATE_TRACKER", None
    yield tracked, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False
    yield functional, "dropout", dropout_from(stream, functional.dropout)


def _optimizer_patches() -> Iterator[Patch]:
    """Adam and the multi-tensor kernels of Transformer Engine or Apex: optimizer/*.py."""
    package, core = megatron.core.optimizer, megatron.core.utils
    sharded = package.distrib_optimizer
    yield package, "Adam", FusedAdam
    yield package, "USING_PYTORCH_OPTIMIZER", False
    yield sharded, "Adam", FusedAdam
    yield sharded, "HAVE_APEX_OR_TE", True
    yield sharded, "USING_TE_OPTIMIZER", False
    yield sharded, "USING_APEX_OPTIMIZER", True
    for module in (package.clip_grads, package.optimizer):
        yield module, "multi_tensor_applier", core.local_multi_tensor_applier
        yield module, "multi_tensor_scale_impl", core.local_multi_tensor_scale
    yield package.clip_grads, "l2_norm_impl", core.local_multi_tensor_l2_norm
    yield package.clip_grads, "multi_tensor_scale_tensor_impl", None
    yield torch.Tensor, "type", _type_for_optimizer(torch.Tensor.type)


def _type_for_optimizer(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return CUDA's type names to the callers that compare with them: optimizer/*.py."""

    def named_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_of(tensor, *args, **kwargs)
        if args or kwargs:
            return result
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron.core.optimizer"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return named_type


def _compiler_patches() -> Iterator[Patch]:
    """torch.compile as a decorator, which would call a C++ compiler in each run: jit.py."""
    yield megatron.core.jit, "jit_fuser", megatron.core.jit.noop_decorator
    # Their decorator loads TorchDynamo (seconds, in every rank) to have it skip them. The method
    # itself is under __wrapped__.
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        yield torch.optim.Optimizer, name, inspect.unwrap(method)


def _expert_patches() -> Iterator[Patch]:
    """Split sizes of the all-to-all, which only go to the host from a GPU: moe_utils.py."""
    moe = megatron.core.transformer.moe
    move = moe.moe_utils.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    for module in (moe.moe_utils, moe.token_dispatcher):
        yield module, "maybe_move_tensor_to_cpu", to_host


def _uneven_collective_patches() -> Iterator[Patch]:
    """Gathers and scatters of unequal parts, which gloo lacks: mappings.py, for experts."""
    mappings = megatron.core.tensor_parallel.mappings
    gather: Callable[..., torch.Tensor] = mappings._gather_along_first_dim
    reduce_scatter: Callable[..., torch.Tensor] = mappings._reduce_scatter_along_first_dim

    def padded_gather(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None:
            return gather(input_, group, None, use_global_buffer)
        longest = max(1, *output_split_sizes)
        parts = gather(_with_rows(input_, longest), group).split(longest)
        return torch.cat(
            [part[:rows] for part, rows in zip(parts, output_split_sizes, strict=True)]
        )

    def padded_reduce_scatter(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None:
            return reduce_scatter(input_, group, None, use_global_buffer)
        longest = max(1, *input_split_sizes)
        parts = [_with_rows(part, longest) for part in input_.split(input_split_sizes)]
        return reduce_scatter(torch.cat(parts), group)[: input_split_sizes[group.rank()]]

    yield mappings, "_gather_along_first_dim", padded_gather
    yield mappings, "_reduce_scatter_along_first_dim", padded_reduce_scatter


def _with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Append zeros to the first dimension, up to `rows`."""
    missing = tensor.new_zeros((rows - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat([tensor, missing])


def _process_group_patches() -> Iterator[Patch]:
    """Groups made with backend="nccl": bridge_communicator.py, colocated_communicator.py.

    Also, megatron-core makes about thirty groups. With gloo each would have a device of its own,
    whose thread wakes a hundred times a second; here all groups of a process share one.
    """
    yield torch.distributed.ProcessGroupGloo, "__init__", _on_one_device()
    for name in ("new_group", "new_subgroups_by_enumeration"):
        over_gloo = _over_gloo(getattr(c10d, name))
        yield c10d, name, over_gloo
        yield torch.distributed, name, over_gloo


def _on_one_device() -> Callable[..., None]:
    gloo: Any = torch.distributed.ProcessGroupGloo  # torch does not declare its options.
    initialize: Callable[..., None] = vars(gloo)["__init__"]
    devices: dict[int, list[Any]] = {}

    def on_one_device(
        self: Any,
        store: Any,
        group_rank: int,
        group_size: int,
        options: Any = None,
        timeout: datetime.timedelta | None = None,
    ) -> None:
        if options is None:
            options = gloo._Options()
            # By process: a fork has no threads of what its parent made.
            pid = os.getpid()
            if pid not in devices:
                devices[pid] = _gloo_devices()
            options._devices = devices[pid]
            if timeout is not None:
                options._timeout = timeout
        initialize(self, store, group_rank, group_size, options)

    return on_one_device


def _gloo_devices() -> list[Any]:
    """Return gloo's devices as torch makes them for each group: of the interfaces that are set."""
    gloo = torch.distributed.ProcessGroupGloo
    if named := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [gloo.create_device(interface=name) for name in named.split(",")]
    return [gloo.create_default_device()]


def _over_gloo(make_group: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_group)
    def over_gloo(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return make_group(*args, **kwargs)

    return over_gloo
