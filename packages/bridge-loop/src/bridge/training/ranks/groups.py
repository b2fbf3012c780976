"""The process groups of a run: initialize them, or use those of the program.

A run that finds torch.distributed or megatron-core's groups initialized uses them and leaves them
as they were, so that the loop can run inside a larger program.
"""

import contextlib
import datetime
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from bridge.training import cpu
from bridge.training.config import ConfigContainer, Layout, layout_of
from bridge.training.config.layout import embedding_stages
from bridge.training.contracts import ModelRanks, PlacesModules
from bridge.training.launchers import rank_environment
from bridge.training.megatron_import import expected_messages_held_back
from bridge.training.megatron_patches import destroy_model_parallel
from bridge.training.ranks.launcher_store import meeting_store, rank, world_size
from bridge.training.ranks.megatron_globals import restored_globals
from bridge.training.ranks.model_ranks import to_model_ranks
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# Every rank has started the same number of runs, so they agree on it without a collective.
_runs = itertools.count()


type Device = Literal["cuda", "cpu"]


def choose_device(wanted: Literal["auto", "cuda", "cpu"]) -> Device:
    """Return the device of this machine for a value of ``dist.device``.

    Raises:
        UsageError: It is cuda and the process sees no GPU, or it is cpu and the process sees one
            (the CPU emulation never hides a device that exists).
    """
    present = torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise UsageError(
            "dist.device: 'cuda' was asked for and this process sees no GPU; use dist.device=cpu "
            "to try the run on a CPU, or look at `bridge doctor`"
        )
    if wanted == "cpu" and present:
        raise UsageError(
            "dist.device: 'cpu' was asked for and this process sees a GPU; hide it with "
            "CUDA_VISIBLE_DEVICES= in the environment (the bridge command does that by itself)"
        )
    return "cuda" if present else "cpu"


@dataclass(kw_only=True, frozen=True)
class Ranks:
    """The ranks of a run, as seen from this one."""

    device: Device
    layout: Layout
    model: ModelRanks
    """The division of the model over the ranks."""
    control_group: dist.ProcessGroup
    """All ranks over gloo, for agreements of the hosts without a host-device sync."""

    @property
    def pg_collection(self) -> "ProcessGroupCollection":
        """The process groups as `train_step`, megatron-core's schedules and models take them."""
        groups: ProcessGroupCollection = self.model.pg_collection
        return groups


@contextlib.contextmanager
def ranks_of(config: ConfigContainer, device: Device) -> Iterator[Ranks]:
    """Initialize the process groups of a resolved configuration, and destroy them at the end.

    At the end megatron-core's globals and the current device are restored.

    Args:
        config: A resolved configuration.
        device: The result of `choose_device`.
    """
    layout = layout_of(config.model, world_size())
    timeout = datetime.timedelta(minutes=config.dist.timeout_minutes)
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(cpu.cpu_training())
        else:
            # Without a launcher the device is the one that the program has chosen.
            stack.enter_context(torch.cuda.device(_own_gpu()))
        stack.enter_context(restored_globals())
        if not dist.is_initialized():
            _initialize_default_group(device, timeout)
            stack.callback(_destroy_default_group)
        module_ranks = None
        if isinstance(config.model, PlacesModules):
            module_ranks = config.model.module_ranks(world_size=world_size(), timeout=timeout)
        if module_ranks is None:
            module_ranks = _megatron_groups(layout, timeout, embedding_stages(config.model))
        model_ranks = to_model_ranks(stack.enter_context(module_ranks))
        control_group = dist.new_group(backend="gloo", timeout=timeout)
        stack.callback(dist.destroy_process_group, control_group)
        yield Ranks(device=device, layout=layout, model=model_ranks, control_group=control_group)


@contextlib.contextmanager
def _megatron_groups(
    layout: Layout, timeout: datetime.timedelta, stages_with_embedding: list[int]
) -> Iterator["ProcessGroupCollection"]:
    """Initialize megatron-core's own groups, or use those of the program."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if parallel_state.model_parallel_is_initialized():
        _check_layout(layout)
        _check_embedding_group(stages_with_embedding)
        yield ProcessGroupCollection.use_mpu_process_groups()
        return

    def embedding_ranks(pipeline: list[int], _: int | None = None) -> list[int]:
        return [pipeline[stage] for stage in stages_with_embedding]

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        get_embedding_ranks=embedding_ranks,
        # It becomes a timedelta, so it may be a fraction, although its annotation is int.
        distributed_timeout_minutes=timeout / datetime.timedelta(minutes=1),  # type: ignore[arg-type]
    )
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        destroy_model_parallel()


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Initialize what one process needs for megatron-core's checkpoints, with a GPU or without.

    Raises:
        UsageError: The process is one of several ranks.
    """
    if world_size() > 1:
        raise UsageError("this is done by one process; start it without a launcher")
    with contextlib.ExitStack() as stack:
        stack.enter_context(expected_messages_held_back())
        if not torch.cuda.is_available():
            stack.enter_context(cpu.cpu_training())
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            stack.callback(_destroy_default_group)
        yield


def _initialize_default_group(device: Device, timeout: datetime.timedelta) -> None:
    # CPU tensors are exchanged too (objects, checkpoints), so a GPU run has both backends.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    device_id = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
    dist.init_process_group(
        backend,
        store=_store(timeout),
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
        device_id=device_id,
    )


def _own_gpu() -> int | None:
    """Return the index of this rank's GPU, None for the one that the program has chosen."""
    environment = rank_environment()
    if environment.may_see_own_gpu_alone and torch.cuda.device_count() == 1:
        return 0
    return environment.local_rank


def _store(timeout: datetime.timedelta) -> dist.Store:
    """Return a store without keys of earlier runs of these processes.

    A launcher's store outlives the process groups. A second run that read the first one's keys
    would wait for peers that have ended.
    """
    if world_size() == 1:
        # One process needs no port.
        return dist.HashStore()
    store = meeting_store()
    store.set_timeout(timeout)
    return dist.PrefixStore(f"bridge-{next(_runs)}", store)


def _check_layout(wanted: Layout) -> None:
    """Reject groups of the program that have another layout."""
    from megatron.core import parallel_state

    present = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    differing = {name: size for name, size in present.items() if getattr(wanted, name) != size}
    if differing:
        asked = ", ".join(f"{name} {getattr(wanted, name)}" for name in differing)
        found = ", ".join(f"{name} {size}" for name, size in differing.items())
        raise UsageError(
            f"model: the configuration asks for parallel sizes {asked}, and megatron-core's groups "
            f"are initialized already with {found}; make them equal, or let pretrain make the "
            "groups (parallel_state.destroy_model_parallel before it)"
        )


def _check_embedding_group(stages: list[int]) -> None:
    """Reject groups of the program that lack a stage with the embedding."""
    from megatron.core import parallel_state

    pipeline = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    wanted = [pipeline[stage] for stage in stages]
    group = parallel_state.get_embedding_group(check_initialized=False)
    present = [] if group is None else dist.get_process_group_ranks(group)
    if present != (wanted if dist.get_rank() in wanted else []):
        raise UsageError(
            f"model.pipeline_model_parallel_layout: ranks {wanted} hold the embedding's weight, "
            "and megatron-core's groups are initialized already with another embedding group; pass "
            "get_embedding_ranks to initialize_model_parallel, or let pretrain make the groups"
        )


def _destroy_default_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
