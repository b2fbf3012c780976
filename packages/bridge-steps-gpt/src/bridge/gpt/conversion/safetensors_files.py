"""Safetensors files of a model, one or several, read and written tensor by tensor."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bridge.gpt.conversion.json_files import read_json, write_json
from bridge.training.file_kinds import FileKind, head_of, kind_of
from bridge.training.usage_error import UsageError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class TensorFolder:
    """Reads the tensors of a folder: those of its index, or of its only file.

    A context manager: files stay open within the block. A tensor is loaded when it is read.

    Raises:
        UsageError: The folder has no such files, one of them is not there, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of = self._find()

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._stack.close()

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        with self._opened(self._file_of[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in the type that it has in the file."""
        with self._opened(self._file_of[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def _find(self) -> dict[str, str]:
        if (self._folder / _INDEX).exists():
            index = read_json(self._folder / _INDEX).get("weight_map")
            if not isinstance(index, dict):
                raise UsageError(f"{self._folder / _INDEX}: has no weight_map; fetch it again")
            return index
        if not (self._folder / _SINGLE).exists():
            raise UsageError(
                f"{self._folder}: has neither {_SINGLE} nor {_INDEX}; only weights in safetensors "
                "files can be read"
            )
        with self._opened(_SINGLE) as file:
            return dict.fromkeys(file.keys(), _SINGLE)

    @contextlib.contextmanager
    def _opened(self, file_name: str) -> Iterator[Any]:
        path = self._folder / file_name
        try:
            if file_name not in self._files:
                file: Any = safe_open(path, framework="pt")
                self._files[file_name] = self._stack.enter_context(file)
            yield self._files[file_name]
        except FileNotFoundError as error:
            raise UsageError(f"{path}: is not there, and {_INDEX} names it; fetch it") from error
        except (SafetensorError, OSError) as error:
            kind = kind_of(head_of(path)) if path.is_file() else None
            if kind not in (None, FileKind.SAFETENSORS):
                raise UsageError(f"{path}: is {kind}, not safetensors; fetch it again") from error
            raise UsageError(f"{path}: is damaged ({error}); fetch it again") from error


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, max_shard_size: int
) -> tuple[int, int]:
    """Write tensors into one file, or into several and an index.

    No more than one file's tensors are held at a time.

    Args:
        folder: An existing folder.
        tensors: Names and tensors, in the order in which they fill the files.
        max_shard_size: Bytes of a file; a tensor that is larger has a file of its own.

    Returns:
        The number of bytes and the number of files.

    Raises:
        OSError: Nothing more can be written, as on a full disk.
    """
    written: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = shard_size = 0

    def finish() -> None:
        if shard:
            write_file(_numbered(folder, len(written)), shard)
            written.append(list(shard))
            shard.clear()

    for name, tensor in tensors:
        if shard_size + tensor.nbytes > max_shard_size:
            finish()
            shard_size = 0
        shard[name] = tensor.contiguous()
        shard_size += tensor.nbytes
        total += tensor.nbytes
    finish()
    _name_files(folder, written, total)
    return total, len(written)


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file of tensors.

    Raises:
        OSError: Nothing more can be written, as on a full disk.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def _numbered(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.safetensors"


def _name_files(folder: Path, written: list[list[str]], total: int) -> None:
    """Rename the files to their final names, which contain the number of files."""
    count = len(written)
    if count == 1:
        _numbered(folder, 0).rename(folder / _SINGLE)
        return
    index: dict[str, str] = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        _numbered(folder, number).rename(folder / file)
        index |= dict.fromkeys(names, file)
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})
