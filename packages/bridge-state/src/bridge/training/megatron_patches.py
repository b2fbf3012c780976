"""The seam to megatron-core: the patches of it and of torch, each with its reason.

Bridge works with one version of megatron-core, `MEGATRON_CORE`, since it uses private names of it.
All uses of private names of megatron-core and torch are functions of this module, each with its
reason and, where one is known, the upstream issue or pull request. A change of the version begins
here. megatron-core is imported inside the functions, so that importing this module stays light.

Only these are somewhere else:

- changes that last while megatron-core is being imported: `bridge.training.megatron_import`;
- the table of the CPU emulation: `bridge.training.cpu.patches`;
- the private name that bridge-peft needs, which imports no other package:
  `bridge.peft.private_names`.

Our subclasses of megatron-core's classes override private methods, with ``typing.override``:

- `bridge.training.transformer.router.Router._apply_seq_aux_loss`: megatron-core divides by the mean
  length of the sequences, while padding lies unevenly in them. No upstream issue known; padding
  masks came with NVIDIA/Megatron-LM#2142.
- `bridge.training.transformer.router.Router._apply_expert_bias`: the padding mask does not fit the
  shape of the routing map. NVIDIA/Megatron-LM#6111, fixed after this version by #6114.
- `bridge.gpt.model.GPT._postprocess`: under uneven masks the MTP loss depends on the layout and on
  the micro batch size. NVIDIA/Megatron-LM#2417 is a part of it.
- `bridge.gpt.model.PredictionLayer._get_embeddings`: the padding mask is shifted within the part of
  a sequence-parallel rank. No upstream issue known.
- `bridge.mimo.model.MultimodalModel._forward_encoders`: an encoder on ranks of its own sends each
  replica of the language model the embeddings of its samples (`mark_split_sizes`).
- `bridge.mimo.ranks.communicator.ModuleCommunicator._build_bridge_comms`: bridges between modules
  are ours.
- `bridge.mimo.ranks.communicator._Bridge._communicate_shapes`: notes the number of embeddings from
  each rank, whose gradients go back to it. No upstream issue known.

Some errors of megatron-core are corrected with public names alone:

- `bridge.training.optimizer.saved_state`: the distributed optimizer saves wrong state where buckets
  are padded. NVIDIA/Megatron-LM#5077, merged after this version.
- `bridge.gpt.model.GPT`: on the stages of MTP, an output layer that shares the embedding's weight
  has an unused weight of its own. NVIDIA/Megatron-LM#7577.
- `bridge.gpt.data.pretraining.next_token_samples`: padding is found by a token's id, and the loss
  mask of the first sample is kept for later ones. NVIDIA/Megatron-LM#2170, NVIDIA/Megatron-LM#6981.
- `bridge.training.transformer.local_layers`: norms and attention without Transformer Engine that
  work with sequence and context parallelism and packed sequences. No upstream issue known.
"""

import contextlib
import importlib.util
import multiprocessing.queues
import pickle
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bridge.training.usage_error import UsageError

MEGATRON_CORE = "0.19.2"
"""The version whose private names are used here and in the CPU emulation, and that is tested."""

type Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes the replacement of a function, given the function itself."""


# --- the version


def check_megatron_core() -> None:
    """Reject every version of megatron-core but `MEGATRON_CORE`, without importing it.

    Raises:
        UsageError: Another version is installed.
    """
    found = _version_of_megatron_core()
    if found != MEGATRON_CORE:
        raise UsageError(
            f"megatron-core={found}: Bridge uses private names of version {MEGATRON_CORE} and is "
            f"tested with it alone; pip install megatron-core=={MEGATRON_CORE}"
        )


@cache
def _version_of_megatron_core() -> str:
    """Return the version of the package that an import would find, installed or not.

    Its ``package_info.py`` is read, as importing it would import all of megatron-core.
    """
    package = importlib.util.find_spec("megatron.core")
    if package is None or package.origin is None:
        return "unknown"
    info = Path(package.origin).with_name("package_info.py")
    text = info.read_text() if info.is_file() else ""
    constants = dict(re.findall(r"""^([A-Z_]+) = ["']?([^"'\n]*)["']?$""", text, re.MULTILINE))
    numbers = [constants.get(name, "") for name in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(numbers) + constants.get("PRE_RELEASE", "") if all(numbers) else "unknown"


# --- process groups and what megatron-core keeps for the whole process


def default_store() -> dist.Store:
    """Return the store of the default process group.

    torch has no public function for it (pytorch/pytorch#151960 proposes public objects).
    """
    return dist.distributed_c10d._get_default_store()


def destroy_model_parallel() -> None:
    """Take down megatron-core's process groups.

    Its own function forgets most of them and leaves them running: NVIDIA/Megatron-LM#6897.
    """
    from megatron.core import parallel_state

    # The first entry represents the default group, which this function does not own.
    groups: list[Any] = (parallel_state._global_process_group_list or [])[1:]
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def process_globals() -> Iterator[tuple[Any, str]]:
    """Yield the owner and the name of every variable that megatron-core keeps for the process.

    megatron-core's functions that reset them forget some (NVIDIA/Megatron-LM#7029), and do not
    restore the values that the program around a run has set.
    """
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_token_prediction
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # destroy_model_parallel forgets some of the groups, and schedules set the virtual stage.
    for name in vars(parallel_state):
        if name.startswith("_") and not name.startswith("__"):
            yield parallel_state, name
    yield num_microbatches_calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR"
    yield rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE"
    yield random, "_CUDA_RNG_STATE_TRACKER"
    yield random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED"
    yield moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale"
    yield multi_token_prediction.MTPLossAutoScaler, "main_loss_backward_scale"
    yield token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream"


@contextlib.contextmanager
def own_loss_trackers() -> Iterator[None]:
    """Give this block its own trackers of auxiliary losses, which megatron-core keeps globally.

    A tracker holds process groups, which end with a run. No upstream issue known.
    """
    from megatron.core.transformer.moe import moe_logging
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    found = moe_logging._MOE_METRICS_TRACKER, MTPLossLoggingHelper.tracker
    moe_logging.set_moe_metrics_tracker(moe_logging.MoEMetricsTracker())
    MTPLossLoggingHelper.tracker = {}
    try:
        yield
    finally:
        moe_logging._MOE_METRICS_TRACKER, MTPLossLoggingHelper.tracker = found


def ensure_global_memory_buffer() -> None:
    """Make the buffer that sequence parallelism gathers into, unless there is one.

    Only ``initialize_model_parallel`` makes it, which modules on ranks of their own do not call. No
    upstream issue known.
    """
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


# --- kernels, timers, tokenizers and samples


def has_fused_gradient_accumulation() -> bool:
    """Whether Apex's kernel is installed that adds up weight gradients in the matrix product.

    megatron-core has no public name for it. No upstream issue known.
    """
    from megatron.core.tensor_parallel import layers

    return bool(layers._grad_accum_fusion_available)


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Fail on the device where `condition` is false, without a host-device sync.

    There is no public function yet: pytorch/pytorch#53284. On CUDA the message is not printed:
    pytorch/pytorch#131491.

    Raises:
        RuntimeError: `condition` is false, on a CPU at once.
    """
    torch._assert_async(condition, message)


def slowest_times(timers: Any, names: Sequence[str], *, steps: int) -> dict[str, float]:
    """Return the seconds per step of the slowest rank for each timer; a collective.

    The timers are reset. The public ``write`` of megatron-core's timers writes to TensorBoard and
    W&B only. No upstream issue known.
    """
    times = timers._get_global_min_max_time(names, reset=True, barrier=False, normalizer=steps)
    return {name: slowest for name, (_, slowest) in times.items()}


def library_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer of transformers or tiktoken inside a tokenizer of megatron-core.

    megatron-core's has no method for special tokens written in a text. No upstream issue known.
    """
    return tokenizer._tokenizer.tokenizer


def tokens_of_sample(dataset: Any, index: int) -> tuple[Any, Any]:
    """Return the token ids of a sample of a GPTDataset, and the lengths of the documents' parts.

    The public ``__getitem__`` finds padding by a token id: NVIDIA/Megatron-LM#6981.
    """
    ids, _, lengths = dataset._query_document_sample_shuffle_indices(index)
    return ids, lengths


# --- modules on ranks of their own


@contextlib.contextmanager
def own_bridge_groups() -> Iterator[None]:
    """Give this block process groups of its own for bridges between modules.

    megatron-core caches them by ranks for the whole process, even when the default group has been
    destroyed. No upstream issue known.
    """
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    found = BridgeCommunicator._broadcast_pg_cache, BridgeCommunicator._bridge_pg_cache
    BridgeCommunicator._broadcast_pg_cache, BridgeCommunicator._bridge_pg_cache = {}, {}
    try:
        yield
    finally:
        BridgeCommunicator.destroy_broadcast_pgs()
        BridgeCommunicator.destroy_bridge_pgs()
        BridgeCommunicator._broadcast_pg_cache, BridgeCommunicator._bridge_pg_cache = found


def bridge_batch_dimension(bridge: Any) -> int:
    """Return the dimension in which a bridge splits tensors for the receiving ranks.

    No upstream issue known.
    """
    return int(bridge._batch_dim)


def mark_split_sizes(tensor: torch.Tensor, sizes: list[int]) -> None:
    """Record the numbers of embeddings by which a bridge splits `tensor`.

    The bridge reads them from an attribute of the tensor. megatron-core's own model sets it, after
    a host-device sync: NVIDIA/Megatron-LM#5062.
    """
    tensor._mimo_bridge_split_sizes = sizes  # type: ignore[attr-defined]


def optimizers_of_modules(optimizer: Any) -> list[Any]:
    """Return the optimizers that a MimoOptimizer has on this rank.

    No upstream issue known.
    """
    found: list[Any] = optimizer._active_optimizers
    return found


# --- data loading workers


def shut_down_workers(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator; wait up to five seconds for each.

    torch does so when the iterator is collected, but a traceback may keep it alive.
    """
    iterator._shutdown_workers()


def forget_workers(iterator: Any) -> None:
    """Do what ``_shutdown_workers`` does without waiting for the workers.

    A worker that does not end holds the process up: pytorch/pytorch#39570, pytorch/pytorch#81794.
    """
    from torch.utils.data._utils import signal_handling

    if iterator._shutdown:
        return
    iterator._shutdown = True
    if iterator._worker_pids_set:
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    if iterator._pin_memory:
        iterator._pin_memory_thread_done_event.set()


def on_unsent_batch(handler: Callable[[Exception, Any], None]) -> None:
    """Have `handler` called in this worker process if a batch cannot be sent.

    Otherwise Python drops the batch, and the training process waits for it forever:
    pytorch/pytorch#142884.

    Args:
        handler: Takes the error and the batch.
    """
    # A hook of Python's for subclasses.
    queues: Any = multiprocessing.queues.Queue
    queues._on_queue_feeder_error = staticmethod(handler)


# --- checkpoints


@contextlib.contextmanager
def checkpoint_writer_replaced(write: Wrapper, write_item: Wrapper) -> Iterator[None]:
    """Wrap the functions that write a checkpoint's files, and have them write in this process.

    megatron-core passes the results of writing through a queue of another process. That process
    takes seconds to start, imports the user's script a second time, and outlives a rank that is
    killed. No upstream issue known (NVIDIA/Megatron-LM#3424 has this process write the last files).

    Args:
        write: Wraps the function that writes a rank's files.
        write_item: Wraps the function that writes one tensor or object.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer: Any = filesystem_async.FileSystemWriterAsync
    results: Any = queue.Queue()
    with (
        # A static method.
        _replaced(writer, "write_preloaded_data", lambda found: staticmethod(write(found))),
        _replaced(filesystem_async, "_write_item", write_item),
        _replaced(filesystem_async, "_results_queue", lambda _: results),
    ):
        yield


@contextlib.contextmanager
def unpickling_replaced(
    *, load: Wrapper, loads: Wrapper, load_torch: Wrapper, slice_file: Wrapper
) -> Iterator[None]:
    """Wrap the functions with which libraries unpickle parts of a checkpoint.

    torch.distributed.checkpoint unpickles the index as it is (pytorch/pytorch#189308), and
    Transformer Engine's modules their extra states.

    Args:
        load: Wraps pickle.load.
        loads: Wraps pickle.loads.
        load_torch: Wraps torch.load.
        slice_file: Wraps the method of torch.distributed.checkpoint that finds an entry in a file.
    """
    from torch.distributed.checkpoint import FileSystemReader

    with (
        _replaced(pickle, "load", load),
        _replaced(pickle, "loads", loads),
        _replaced(torch, "load", load_torch),
        _replaced(FileSystemReader, "_slice_file", slice_file),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        setattr(owner, name, original)
