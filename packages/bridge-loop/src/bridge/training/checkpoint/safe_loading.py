"""Loading of checkpoints of any source: only listed types are unpickled.

A pickle names functions and calls them while it is loaded. Checkpoints hold pickles in several
places: the index `.metadata`, which torch.distributed.checkpoint unpickles unchecked; entries
that are no tensors (random-number states, common state, extra states of modules), which it loads
with ``weights_only=False``; and the extra states of Transformer Engine's modules, which those
unpickle themselves as they load them. So the restriction cannot be an argument of ours: it holds
for everything that the thread unpickles within `restricted_loading`, whichever library does it.

Objects that ranks of a run send each other are not affected: torch.distributed has an unpickler of
its own.
"""

import contextlib
import io
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, override

import torch

from bridge.training.megatron_patches import unpickling_replaced
from bridge.training.usage_error import UsageError

_METADATA = "torch.distributed.checkpoint.metadata"
_TYPES = frozenset(
    {
        *(
            (_METADATA, name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
    }
)
"""Types of `.metadata`; those of extra states are listed in megatron-core's SafeUnpickler."""

# Two threads that load at once would put back each other's functions.
_lock = threading.RLock()


class RejectedType(UsageError):
    """A checkpoint holds a type outside of the list; nothing of that entry was loaded."""

    def __init__(self, file: str, entry: str, names: list[str]) -> None:
        types = f"the type {', '.join(names)}" if names else "a pickle that cannot be looked into"
        super().__init__(
            f"{file}: the entry {entry!r} has {types}, which checkpoints of a run do not have and "
            "which may run code when it is loaded; nothing of it was loaded; ask who made the "
            "checkpoint, and take one from a source that you trust"
        )
        self.file = file
        self.entry = entry
        self.types = names

    @override
    def __reduce__(self) -> tuple[type[Self], tuple[str, str, list[str]]]:
        """Let other ranks raise it too."""
        return type(self), (self.file, self.entry, self.types)


@contextlib.contextmanager
def restricted_loading(
    checkpoint: Path, extra_states: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Let this thread unpickle listed types alone, within the block.

    Args:
        checkpoint: Its folder, for messages.
        extra_states: The extra states that modules load within the block, by name. A rejected one
            is found there by its content, so that the message has its name.

    Raises:
        RejectedType: Another type was found. It is raised at the end of the block too, as
            torch.distributed.checkpoint takes an error in `.metadata` for an absent file.
        UsageError: A pickle is damaged.
    """
    from torch.distributed.checkpoint import CheckpointException

    loading = _Loading(checkpoint, extra_states or {})
    replaced = unpickling_replaced(
        load=_in_this_thread(loading.load),
        loads=_in_this_thread(loading.loads),
        load_torch=_in_this_thread(loading.load_torch),
        slice_file=_in_this_thread(loading.slice_file),
    )
    with _lock, replaced:
        try:
            yield
        except (Exception, CheckpointException) as error:
            if loading.failure is None or loading.failure is error:
                raise
            raise loading.failure from error
        if loading.failure is not None:
            raise loading.failure


def _in_this_thread(
    restricted: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator by which this thread calls `restricted` with the function instead."""
    thread = threading.get_ident()

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def either(*arguments: Any, **keywords: Any) -> Any:
            if threading.get_ident() != thread:
                return original(*arguments, **keywords)
            return restricted(original, *arguments, **keywords)

        return either

    return wrap


class _Loading:
    """Replacements of the functions that unpickle; they know which entry is being read."""

    def __init__(self, checkpoint: Path, extra_states: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._extra_states = extra_states
        self._reader: Any = None
        self._slice: Any = None
        self.failure: UsageError | None = None
        """The first error."""

    def load(self, original: Callable[..., Any], file: Any, **keywords: Any) -> Any:
        """Replace pickle.load, which reads `.metadata`."""
        path = Path(str(getattr(file, "name", self._checkpoint)))
        with self._noting_failure():
            loaded = _unpickled(file, str(path), lambda: path.name, keywords)
            if path.name == ".metadata":
                _check_files(loaded, path)
        return loaded

    def loads(self, original: Callable[..., Any], data: Any, /, **keywords: Any) -> Any:
        """Replace pickle.loads, with which modules read their extra states."""

        def entry() -> str:
            states = self._extra_states.items()
            return next((key for key, it in states if _content(it) == bytes(data)), "extra state")

        with self._noting_failure():
            return _unpickled(io.BytesIO(data), str(self._checkpoint), entry, keywords)

    def load_torch(
        self, original: Callable[..., Any], f: Any, *arguments: Any, **keywords: Any
    ) -> Any:
        """Replace torch.load, which reads the entries that are no tensors."""
        keywords["weights_only"] = True
        keywords.pop("pickle_module", None)
        with self._noting_failure():
            try:
                return original(f, *arguments, **keywords)
            except pickle.UnpicklingError as error:
                raise RejectedType(*self._place(f), _rejected_types(f)) from error

    def slice_file(self, original: Callable[..., Any], reader: Any, file: Any, place: Any) -> Any:
        """Note which entry of which file torch.distributed.checkpoint reads next."""
        self._reader, self._slice = reader, place
        return original(reader, file, place)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            self.failure = self.failure or error
            raise

    def _place(self, file: Any) -> tuple[str, str]:
        if isinstance(file, str | Path):
            return str(file), Path(file).name
        if self._reader is None:
            return str(self._checkpoint), "extra state"
        entries = self._reader.storage_data.items()
        entry = next((index.fqn for index, place in entries if place is self._slice), "?")
        return str(self._checkpoint / self._slice.relative_path), entry


def _unpickled(file: Any, path: str, entry: Callable[[], str], keywords: Mapping[str, Any]) -> Any:
    from megatron.core.safe_globals import SafeUnpickler

    class Unpickler(SafeUnpickler):
        @override
        def find_class(self, module: str, name: str) -> Any:
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if is_dtype or (module, name) in _TYPES:
                return pickle.Unpickler.find_class(self, module, name)
            try:
                return super().find_class(module, name)
            except pickle.UnpicklingError as error:
                raise RejectedType(path, entry(), [f"{module}.{name}"]) from error

    try:
        return Unpickler(file, **keywords).load()
    except RejectedType:
        raise
    except Exception as error:  # Damaged pickles raise errors of any kind.
        raise UsageError(
            f"{path}: {entry()} cannot be read ({type(error).__name__}: {error}); the file is "
            "damaged, take another checkpoint"
        ) from error


def _check_files(metadata: Any, path: Path) -> None:
    """Reject an index that leads to files outside of its folder."""
    from torch.distributed.checkpoint import Metadata

    if not isinstance(metadata, Metadata):
        raise UsageError(f"{path}: is no index of a checkpoint; it is damaged, take another one")
    for place in metadata.storage_data.values():
        if "/" in place.relative_path or place.relative_path in ("", ".", ".."):
            raise UsageError(
                f"{path}: leads to {place.relative_path!r}, which is not a file of the checkpoint; "
                "nothing was loaded; take a checkpoint from a source that you trust"
            )


def _content(value: Any) -> bytes | None:
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        return value.detach().cpu().numpy().tobytes()
    return value.getvalue() if isinstance(value, io.BytesIO) else None


def _rejected_types(file: Any) -> list[str]:
    if hasattr(file, "seek"):
        file.seek(0)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (ValueError, RuntimeError, pickle.UnpicklingError):
        # Not of the form in which torch.save writes.
        return []
