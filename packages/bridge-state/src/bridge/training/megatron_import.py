"""Imports megatron-core without its noise, and on a machine without a GPU without its wait.

Only the first module that imports megatron-core needs this (`bridge.training.config` does it);
whatever is imported after it may import megatron-core plainly.
"""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bridge.training.megatron_patches import check_megatron_core

_EXPECTED_WARNINGS = (
    r"(Transformer Engine and Apex are|Apex is) not installed",
    # The default of a field that nobody set.
    "full scope is deprecated",
    r"(MimoModelConfig|MimoModel|ModalitySubmodules) is experimental",
    # The optimizer looks whether a shard, a view of its parameter, has a gradient.
    r"The \.grad attribute of a Tensor that is not a leaf",
)
_EXPECTED_RECORDS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # Its advice, to migrate to HybridModel, is none that users of ours can take.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.rerun_state_machine": "RerunStateMachine initialized in mode RerunMode.DISABLED",
}
_TRACKERS = ("wandb", "torch.utils.tensorboard")


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import megatron-core inside this: silent about extensions that are absent, and fast.

    Only the messages about absent extensions are held back (``bridge doctor`` says them once,
    with the remedy); any other warning passes. On exit all is as before, with one exception: a
    Transformer Engine that is installed where there is no GPU stays blocked for the process,
    because megatron-core has by then decided to do without it, and its later lazy imports must
    come to the same result.

    Raises:
        UsageError: megatron-core is of another version than Bridge is written for.
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
    """Tell whether a CUDA device is there, without starting the CUDA runtime.

    The runtime reads CUDA_VISIBLE_DEVICES once, and a process that has started it cannot fork:
    the answer comes from NVML instead wherever that is possible.
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
    """Hold back what megatron-core says on every start and a user can do nothing about."""
    with ExitStack() as stack:
        for name, start in _EXPECTED_RECORDS.items():
            stack.enter_context(_records_held_back(logging.getLogger(name), start))
        stack.enter_context(warnings.catch_warnings())
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        # megatron-core's docstrings, told once, when Python first compiles them.
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
    """Let `import name` fail inside, for modules that are not imported yet.

    megatron-core's timers import both trackers to recognise their writers. Values reach our
    writers without its help, so an import of bridge costs the seconds of neither.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            # A module that was imported after all, past the block, is left alone.
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


def _block_transformer_engine() -> None:
    """Make `import transformer_engine` an ImportError where it is installed but of no use.

    Without a GPU it cannot run, and an installation with its CUDA library alone dies with an
    AssertionError, which megatron-core does not catch.
    """
    name = "transformer_engine"
    if name not in sys.modules and importlib.util.find_spec(name) is not None:
        sys.modules[name] = None  # type: ignore[assignment]


@contextmanager
def _torch_compile_is_identity() -> Iterator[None]:
    """Spare the 41 functions that megatron-core compiles at import.

    Decorating them loads TorchDynamo and Inductor, more than half of the time that the import
    takes, and the kernels they fuse are for GPUs.
    """
    compile_function = torch.compile

    def identity(model: Any = None, **_: Any) -> Any:
        return _same if model is None else model

    torch.compile = identity
    try:
        yield
    finally:
        torch.compile = compile_function


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
