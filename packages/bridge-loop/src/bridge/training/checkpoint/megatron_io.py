"""megatron-core's writing and reading of checkpoints, with errors that give the reason.

megatron-core's own errors have the tracebacks of all ranks, but not the operating system's reason.
"""

import contextlib
import functools
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, override

import torch.distributed as dist

from bridge.training.checkpoint.safe_loading import restricted_loading
from bridge.training.megatron_patches import checkpoint_writer_replaced
from bridge.training.ranks.collectives import from_every_rank
from bridge.training.ranks.launcher_store import rank
from bridge.training.run_files.directory import RunDirectory
from bridge.training.usage_error import UsageError


class SaveError(OSError):
    """A checkpoint cannot be written; the message has rank, path, cause and newest checkpoint."""


def save_sharded(
    state: dict[str, Any],
    folder: Path,
    content: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a state of megatron-core's sharded tensors and objects; a collective over all ranks.

    Args:
        state: Sharded tensors and objects; each is written once, by its main replica.
        folder: An empty folder.
        content: Goes into the checkpoint as its content metadata.
        group: All ranks, which exchange their errors; the default group if None.

    Raises:
        OSError: A rank could not write. It is raised on every rank if megatron-core's writers have
            failed, else on that rank.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException

    failures: list[str] = []
    try:
        with _writing_in_this_process(failures):
            dist_checkpointing.save(
                state, str(folder), async_sharded_save=False, content_metadata=content
            )
    except CheckpointException:
        # Every rank comes here when one has failed.
        lines = [line for of_rank in from_every_rank(failures, group) for line in of_rank]
        if not lines:
            raise
        raise SaveError(lines[0]) from None


@contextlib.contextmanager
def saving(directory: RunDirectory) -> Iterator[None]:
    """Write a checkpoint of a run in this block; an OSError becomes a SaveError.

    Raises:
        SaveError: With the cause and the newest checkpoint.
    """
    try:
        yield
    except OSError as error:
        problem = str(error) if isinstance(error, SaveError) else _line(error, None)
        newest, _ = directory.look_up_latest()
        remedy = (
            "the run has no checkpoint yet"
            if newest is None
            else f"the newest complete checkpoint is {newest}; continue from it with --resume"
        )
        raise SaveError(f"{problem}; {remedy}") from None


def _line(error: Exception, path: str | None) -> str:
    place = getattr(error, "filename", None) or path
    cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return f"rank {rank()} cannot write{f' {place}' if place else ''}: {cause}"


@contextlib.contextmanager
def _writing_in_this_process(failures: list[str]) -> Iterator[None]:
    """Change megatron-core's writer for one synchronous save.

    - It needs no process for its results (`checkpoint_writer_replaced`).
    - `failures` receives the operating system's reason.
    - torch writes a view of a BytesIO. The traceback of an error keeps the view alive in a cycle of
      references, whose collection is a segmentation fault before CPython 3.12.2
      (python/cpython#111211).
    """
    errors: list[Exception] = []

    def noting_errors(write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)
        def write_and_note(*arguments: Any, **keywords: Any) -> Any:
            outcome = write(*arguments, **keywords)
            error = outcome[1] if isinstance(outcome, tuple) else None
            if isinstance(error, Exception):
                errors.append(error)
                # The first one is the cause.
                cause = next((found for found in errors if isinstance(found, OSError)), errors[0])
                failures.append(_line(cause, str(keywords["write_bucket"][0])))
            return outcome

        return write_and_note

    def of_copies(write_item: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write_item)
        def write_copy(transforms: Any, stream: Any, data: Any, *rest: Any, **named: Any) -> Any:
            if isinstance(data, io.BytesIO):
                data = _WithoutView(data.getvalue())
            noting: Any = _Noting(stream, errors)
            return write_item(transforms, noting, data, *rest, **named)

        return write_copy

    log = logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async")
    was_disabled = log.disabled
    # It would report the type of the error alone.
    log.disabled = True
    try:
        with checkpoint_writer_replaced(noting_errors, of_copies):
            yield
    finally:
        log.disabled = was_disabled


class _Noting:
    """A file that keeps its errors: torch's writer makes RuntimeErrors without a reason of them."""

    def __init__(self, stream: Any, errors: list[Exception]) -> None:
        self._stream, self._errors = stream, errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, content: Any) -> Any:
        return self._noted(self._stream.write, content)

    def flush(self) -> None:
        self._noted(self._stream.flush)

    def _noted(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            self._errors.append(error)
            raise


class _WithoutView(io.BytesIO):
    """A BytesIO that returns its content as a copy."""

    @override
    def getbuffer(self) -> Any:
        return self.getvalue()


_WARNINGS_OF_READING = (
    r"torch\.distributed is disabled, unavailable",
    "The argument order of load has been changed",
    "Please use DTensor instead",
)


def load_sharded(checkpoint: Path, wanted: dict[str, Any]) -> Any:
    """Load a sharded state from a checkpoint; a collective over all ranks.

    Raises:
        UsageError: The checkpoint does not fit the model, or it is damaged.
    """
    from megatron.core import dist_checkpointing

    with reading(checkpoint, "it does not fit the model that is configured, or it is damaged"):
        return dist_checkpointing.load(wanted, str(checkpoint))


@contextlib.contextmanager
def reading(checkpoint: Path, meaning: str) -> Iterator[None]:
    """Read a checkpoint of any source in this block; suppress torch's own warnings.

    Args:
        checkpoint: The checkpoint's folder.
        meaning: The likely cause where reading fails, for the message.

    Raises:
        UsageError: In place of errors of megatron-core and torch; or the checkpoint has a type that
            is not unpickled.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings(), restricted_loading(checkpoint):
            # torch warns about how megatron-core calls it.
            for message in _WARNINGS_OF_READING:
                warnings.filterwarnings("ignore", message)
            yield
    except json.JSONDecodeError as error:
        # megatron-core reads no other file of JSON.
        raise UsageError(
            f"{checkpoint / 'metadata.json'}: is no JSON ({error}); the file is damaged, take "
            "another checkpoint"
        ) from error
    except (CheckpointingException, CheckpointException, KeyError, OSError) as error:
        raise UsageError(
            f"{checkpoint}: {meaning} ({_first_reason(error)}); compare "
            f"{checkpoint / 'config.yaml'} with `bridge show`"
        ) from error


def _first_reason(error: BaseException) -> str:
    """Return one line: torch's own error holds the tracebacks of all ranks."""
    from torch.distributed.checkpoint import CheckpointException

    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {error}"


def extra_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that modules unpickle themselves, of all chunks."""
    return {
        name: value
        for chunk in state.values()
        if isinstance(chunk, Mapping)
        for name, value in chunk.items()
        if str(name).endswith("_extra_state")
    }


def keep_extra_states(wanted: dict[str, Any], checkpoint: Path) -> None:
    """Let Transformer Engine's modules keep their extra states where the checkpoint has none.

    The local layers have no such states, and without FP8 there is nothing in them.
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    with reading(checkpoint, "it is no checkpoint, or it is damaged"):
        saved = {entry.key for entry in load_sharded_metadata(str(checkpoint)).values()}
    for name, entry in wanted.items():
        is_extra = isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state")
        if is_extra and entry.key not in saved:
            wanted[name] = LocalNonpersistentObject(entry.data)
