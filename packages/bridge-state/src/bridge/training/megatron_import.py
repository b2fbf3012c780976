"""The import of megatron-core: silent, and fast on a machine without a GPU.

Each module that may be the first to import megatron-core imports it in `quiet_import`. What is
changed in megatron-core and torch after the import is in `bridge.training.megatron_patches`.
"""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bridge.training.megatron_patches import check_megatron_core

_EXPECTED_WARNINGS = (
    r"(Transformer Engine and Apex are|Apex is) not installed",
    # About the default of a field that the user has not set.
    "full scope is deprecated",
    r"(MimoModelConfig|MimoModel|ModalitySubmodules) is experimental",
    # The optimizer reads the gradient of each shard, which is a view of its parameter.
    r"The \.grad attribute of a Tensor that is not a leaf",
)
_EXPECTED_RECORDS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # It advises to migrate to HybridModel, which our users cannot do.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.rerun_state_machine": "RerunStateMachine initialized in mode RerunMode.DISABLED",
}
_TRACKERS = ("wandb", "torch.utils.tensorboard")


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import megatron-core in this block, silently and fast, if it is the supported version.

    Only messages about absent extensions are suppressed, which ``bridge doctor`` reports with
    the remedy; other warnings pass. At the end everything is as before, with one exception: on a
    machine without a GPU an installed Transformer Engine stays blocked for the process. By then
    megatron-core has decided to do without it, and its later lazy imports must decide the same.

    Raises:
        UsageError: Another version of megatron-core is installed (`check_megatron_core`).
    """
    check_megatron_core()
    with ExitStack() as stack:
        stack.enter_context(expected_messages_held_back())
        stack.enter_context(_hidden_modules(_TRACKERS))
        if not has_gpu():
            _block_transformer_engine()
            stack.enter_context(_torch_compile_is_identity())
        yield


def has_gpu() -> bool:
    """Whether there is a CUDA device, found without starting the CUDA runtime.

    The runtime reads CUDA_VISIBLE_DEVICES once, and a process that has started it cannot fork. So
    NVML is asked instead where that is possible.
    """
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return torch.cuda.is_available()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def expected_messages_held_back() -> Iterator[None]:
    """Suppress the messages of megatron-core that come at every start and need no action."""
    with ExitStack() as stack:
        for name, start in _EXPECTED_RECORDS.items():
            stack.enter_context(_records_held_back(logging.getLogger(name), start))
        stack.enter_context(warnings.catch_warnings())
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        # In megatron-core's docstrings, once, when Python first compiles them.
        warnings.filterwarnings("ignore", "invalid escape sequence", SyntaxWarning)
        yield


@contextmanager
def _records_held_back(logger: logging.Logger, start: str) -> Iterator[None]:
    def is_unexpected(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    logger.addFilter(is_unexpected)
    try:
        yield
    finally:
        logger.removeFilter(is_unexpected)


@contextmanager
def _hidden_modules(names: tuple[str, ...]) -> Iterator[None]:
    """Let `import name` fail in this block, for modules that are not imported yet.

    megatron-core's timers import both trackers to recognize their writers, which takes seconds. Our
    metric loggers do not need them.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            # A module that was imported in spite of the block stays.
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


def _block_transformer_engine() -> None:
    """Make `import transformer_engine` an ImportError where it is installed.

    Without a GPU it cannot run, and an installation of its CUDA library alone fails with an
    AssertionError, which megatron-core does not catch.
    """
    name = "transformer_engine"
    if name not in sys.modules and importlib.util.find_spec(name) is not None:
        sys.modules[name] = None  # type: ignore[assignment]


@contextmanager
def _torch_compile_is_identity() -> Iterator[None]:
    """Let torch.compile return functions as they are: megatron-core decorates 41 of them.

    Compiling loads TorchDynamo and Inductor, which is more than half of the import's time,
    and the fused kernels are for GPUs.
    """
    compile_function = torch.compile

    def identity(model: Any = None, **_: Any) -> Any:
        return identity if model is None else model

    torch.compile = identity
    try:
        yield
    finally:
        torch.compile = compile_function
