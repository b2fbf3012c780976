"""The manifest of a checkpoint: size and checksums of its files, by which damage is found.

It is the last file of a checkpoint to be written. A checksum is the CRC-32 of a block of 64 MiB, so
that several threads share a large file. A checkpoint is read while threads compare its files with
the manifest, and used once they have ended.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from bridge.training.durable_files import replace_durably, sync_file
from bridge.training.ranks.collectives import from_every_rank, on_first_rank
from bridge.training.run_files.configuration import has_end
from bridge.training.run_files.directory import RunDirectory, step_in_name, step_of
from bridge.training.usage_error import UsageError

_logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_VERSION = 1
_BLOCK = 1 << 26
_PIECE = 1 << 20
_MOST_THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it was written."""

    size: int
    """Bytes."""
    crc32: list[int]
    """Checksums of its blocks, in order."""

    def is_valid(self) -> bool:
        """Whether it has a size, and a checksum for each block."""
        return (
            isinstance(self.size, int)
            and isinstance(self.crc32, list)
            and len(self.crc32) == len(_blocks(self.size))
        )


class DamagedCheckpoint(UsageError):
    """A checkpoint's files are not those that were written."""


def record_files(paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Return the records of files, by their names; several threads read them."""
    sizes = {path: path.stat().st_size for path in paths}
    with ThreadPoolExecutor(_threads()) as pool:
        sums = {
            path: list(pool.map(lambda block, path=path: _checksum(path, block), _blocks(size)))
            for path, size in sizes.items()
        }
    return {path.name: FileRecord(size=size, crc32=sums[path]) for path, size in sizes.items()}


def written_by(checkpoint: Path, rank: int) -> list[Path]:
    """Return the files of tensors that a rank has written."""
    return sorted(checkpoint.glob(f"__{rank}_*.distcp"))


def write_manifest(
    checkpoint: Path,
    *,
    step: int | None = None,
    metrics: Path | None = None,
    known: Mapping[str, FileRecord] | None = None,
) -> None:
    """Write the manifest of a checkpoint whose other files are all there.

    Args:
        checkpoint: Its folder.
        step: Steps that the run had done; None for weights alone.
        metrics: The run's metrics.jsonl, whose size is kept and whose records are made durable.
        known: Records that other ranks have made of their files.
    """
    known = known or {}
    rest = [path for path in _files(checkpoint) if path.name not in known]
    files = {**known, **record_files(rest)}
    manifest: dict[str, Any] = {
        "version": _VERSION,
        "block_bytes": _BLOCK,
        "saved_at": time.time(),
    }
    if step is not None:
        manifest["step"] = step
    if metrics is not None and metrics.exists():
        sync_file(metrics)
        manifest["metrics_bytes"] = metrics.stat().st_size
    manifest["files"] = {name: dataclasses.asdict(files[name]) for name in sorted(files)}
    manifest["crc32"] = _checksum_of(manifest)
    replace_durably(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a checkpoint's manifest."""

    checkpoint: Path
    step: int | None
    saved_at: float
    """Seconds since 1970."""
    metrics_bytes: int | None
    """Size of metrics.jsonl when the checkpoint was saved."""
    files: Mapping[str, FileRecord]

    @classmethod
    def read(cls, checkpoint: Path) -> Self | None:
        """Return a checkpoint's manifest; None for one of an older version, which has none.

        Raises:
            DamagedCheckpoint: It is missing although there was one, or it cannot be read.
        """
        path = checkpoint / MANIFEST
        try:
            saved = json.loads(path.read_bytes())
            if saved["version"] != _VERSION or saved["block_bytes"] != _BLOCK:
                raise UsageError(
                    f"{path}: is of version {saved['version']}, and this Bridge reads {_VERSION}; "
                    "use the version of Bridge that wrote it"
                )
            if saved.pop("crc32") != _checksum_of(saved):
                raise ValueError("its own checksum is another")
            return cls(
                checkpoint=checkpoint,
                step=_number(saved.get("step")),
                saved_at=float(saved["saved_at"]),
                metrics_bytes=_number(saved.get("metrics_bytes")),
                files=_records(saved["files"]),
            )
        except FileNotFoundError as error:
            # Manifests are as old as the mark at the end of config.yaml.
            if has_end(checkpoint / "config.yaml"):
                raise DamagedCheckpoint(_message(checkpoint, MANIFEST, "is missing")) from error
            return None
        except UsageError:
            raise
        except OSError as error:
            cause = f"cannot be read ({error.strerror})"
            raise DamagedCheckpoint(_message(checkpoint, MANIFEST, cause)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            cause = f"is no whole manifest ({type(error).__name__}: {error})"
            raise DamagedCheckpoint(_message(checkpoint, MANIFEST, cause)) from error

    def find_problem(self) -> tuple[str, str] | None:
        """Return a file with a problem, without reading the tensors' files.

        That is a missing file, one of another size, or a surplus file of tensors.
        """
        for name, record in self.files.items():
            try:
                size = (self.checkpoint / name).stat().st_size
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                return name, "is missing" if missing else f"cannot be read ({error.strerror})"
            if size != record.size:
                return name, f"has {size:,} bytes of {record.size:,}"
        surplus = {path.name for path in self.checkpoint.glob("*.distcp")} - self.files.keys()
        if surplus:
            return min(surplus), "is no file of this checkpoint"
        if self.step is not None and step_in_name(self.checkpoint) not in (None, self.step):
            return MANIFEST, f"is of the checkpoint of step {self.step}"
        for name, block in self.blocks():
            if not name.endswith(".distcp"):
                if (cause := self.compare(name, block)) is not None:
                    return name, cause
        return None

    def blocks(self) -> Iterator[tuple[str, int]]:
        """Yield file and number of every block."""
        for name, record in self.files.items():
            for block in range(len(record.crc32)):
                yield name, block

    def compare(self, name: str, block: int) -> str | None:
        """Return the problem of a block of a file, None if it is as it was written."""
        try:
            found = _checksum(self.checkpoint / name, block)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if found == self.files[name].crc32[block]:
            return None
        end = min((block + 1) * _BLOCK, self.files[name].size)
        return f"has other content than was written (in bytes {block * _BLOCK:,} to {end:,})"


class Verification:
    """Compares checkpoints with their manifests while they are read.

    A context: its threads end with it. Names, sizes and small files are compared at once, before
    anything is read; the tensors' files in the background, divided over the ranks. The caller reads
    within `explaining_errors` and calls `finish` before what was read is used.

    Args:
        checkpoints: The folders.
        group: All ranks of the run, which all make the same calls; None for one process.

    Raises:
        DamagedCheckpoint: On every rank, with file and cause and the newest older whole checkpoint.
    """

    def __init__(self, checkpoints: Sequence[Path], group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._together = group is not None and dist.get_world_size(group) > 1
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self._manifests = self._on_first(lambda: [_checked(path) for path in checkpoints])
        blocks = [
            (manifest, name, block)
            for manifest in self._manifests
            if manifest is not None
            for name, block in manifest.blocks()
            if name.endswith(".distcp")
        ]
        self._pool = ThreadPoolExecutor(_threads(), thread_name_prefix="verification")
        self._all, self._own = blocks, set(range(rank, len(blocks), size))
        self._results: dict[int, Future[str | None]] = {
            index: self._pool.submit(Manifest.compare, *blocks[index]) for index in self._own
        }

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Read a checkpoint in this block: an error that damage has led to is raised as damage."""
        try:
            yield
        except Exception as error:
            # This rank alone may have failed, so it looks at all files by itself.
            for index in set(range(len(self._all))) - self._own:
                self._results[index] = self._pool.submit(Manifest.compare, *self._all[index])
            if (message := self._find_damage()) is not None:
                raise DamagedCheckpoint(message) from error
            raise

    def finish(self) -> None:
        """Wait for the comparison; on every rank.

        Raises:
            DamagedCheckpoint: On every rank.
        """
        found = self._find_damage()
        # Data loading workers are forked next.
        self._pool.shutdown()
        messages = from_every_rank(found, self._group) if self._together else [found]
        for message in messages:
            if message is not None:
                raise DamagedCheckpoint(message)

    def _find_damage(self) -> str | None:
        for index in sorted(self._results):
            if (cause := self._results[index].result()) is not None:
                manifest, name, _ = self._all[index]
                return _message(manifest.checkpoint, name, cause)
        return None

    def _on_first[T](self, function: Callable[[], T]) -> T:
        return on_first_rank(function, self._group) if self._together else function()


@contextlib.contextmanager
def verified(*checkpoints: Path) -> Iterator[None]:
    """Read checkpoints by one process in this block; it raises where they are damaged.

    Raises:
        DamagedCheckpoint: With file and cause, in place of what damage has led to.
    """
    with Verification(checkpoints) as verification, verification.explaining_errors():
        yield
        verification.finish()


def reject_damaged(checkpoint: Path) -> None:
    """Reject a damaged checkpoint, without reading its tensors.

    Raises:
        DamagedCheckpoint: With file and cause.
    """
    _checked(checkpoint)


def reject_missing_manifest(checkpoint: Path) -> None:
    """Reject a checkpoint without a manifest, whose format version is one that has them.

    Raises:
        DamagedCheckpoint: It has none.
    """
    if not (checkpoint / MANIFEST).exists():
        raise DamagedCheckpoint(_message(checkpoint, MANIFEST, "is missing"))


def without_abandoned(checkpoints: Sequence[Path]) -> list[Path]:
    """Return the checkpoints without those of steps that the run has taken before it went back.

    Those are older than one of fewer steps.

    Args:
        checkpoints: Of one run, by their steps.
    """
    kept, newest = [], 0.0
    for path in checkpoints:
        try:
            manifest = Manifest.read(path)
        except UsageError:
            manifest = None
        # Without a readable manifest there is no time.
        moment = newest if manifest is None else manifest.saved_at
        if moment >= newest:
            kept.append(path)
        newest = max(newest, moment)
    return kept


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are those that were written; reads all of them."""
    try:
        manifest = Manifest.read(checkpoint)
    except UsageError:
        return False
    if manifest is None:
        return (checkpoint / ".metadata").exists()
    if manifest.find_problem() is not None:
        return False
    with ThreadPoolExecutor(_threads()) as pool:
        return not any(pool.map(lambda block: manifest.compare(*block), manifest.blocks()))


def newest_whole(folder: Path, before: int | None = None) -> Path | None:
    """Return the newest whole checkpoint in a run's folder of checkpoints, None if there is none.

    Args:
        folder: The run's ``checkpoints``.
        before: Consider only those of earlier steps.
    """
    known = RunDirectory(folder.parent).saved() if folder.name == "checkpoints" else []
    for path in reversed(known):
        if (before is None or step_of(path) < before) and is_whole(path):
            return path
    return None


def missing_records(run: RunDirectory, checkpoint: Path) -> Iterator[str]:
    """Yield a line where metrics.jsonl lacks records that it had when a checkpoint was saved."""
    manifest = Manifest.read(checkpoint)
    if manifest is None or manifest.metrics_bytes is None:
        return
    size = run.metrics.stat().st_size if run.metrics.exists() else None
    if size is not None and size >= manifest.metrics_bytes:
        return
    last = max((record["step"] for record in run.records()), default=0)
    older = (path for path in reversed(run.saved()) if step_of(path) <= last)
    remedy = next((f": to write them again, --resume --step {step_of(path)}" for path in older), "")
    yield (
        f"warning: {run.metrics} {'is gone' if size is None else 'was cut off'}: records between "
        f"step {last} and step {step_of(checkpoint)} are missing{remedy}"
    )


def _checked(checkpoint: Path) -> Manifest | None:
    manifest = Manifest.read(checkpoint)
    if manifest is None:
        if not (checkpoint / ".metadata").exists():
            raise DamagedCheckpoint(_message(checkpoint, ".metadata", "is missing"))
        _warn_of_no_manifest(checkpoint)
    elif (problem := manifest.find_problem()) is not None:
        raise DamagedCheckpoint(_message(checkpoint, *problem))
    return manifest


@functools.cache
def _warn_of_no_manifest(checkpoint: Path) -> None:
    _logger.warning(
        "%s: has no %s, as an older version wrote it: damage of its files is not found",
        checkpoint,
        MANIFEST,
    )


def _message(checkpoint: Path, name: str, cause: str) -> str:
    step = step_in_name(checkpoint)
    older = None if step is None else newest_whole(checkpoint.parent, before=step)
    if older is None:
        remedy = "there is no older whole checkpoint; take another copy of it, or start anew"
    else:
        remedy = (
            f"the newest older whole checkpoint is {older}: give that, or continue from it with "
            f"--resume --step {step_of(older)} (checkpoint.step={step_of(older)})"
        )
    return f"{checkpoint / name}: {cause}, so the checkpoint is damaged; {remedy}"


def _records(files: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Return the records of a manifest; it may be from anybody, and name files of the system."""
    records = {name: FileRecord(**record) for name, record in files.items()}
    for name, record in records.items():
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is not a file of the checkpoint")
        if not record.is_valid():
            raise ValueError(f"the record of {name!r} has no size with its checksums")
    if ".metadata" not in records:
        raise ValueError("it lacks .metadata")
    return records


def _number(value: Any) -> int | None:
    if value is not None and not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return value


def _checksum_of(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST)


def _blocks(size: int) -> range:
    return range(-(-size // _BLOCK))


def _checksum(path: Path, block: int) -> int:
    checksum, buffer = 0, bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        file.seek(block * _BLOCK)
        left = _BLOCK
        while left and (count := file.readinto(memoryview(buffer)[: min(left, _PIECE)])):
            checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
            left -= count
    return checksum


def _threads() -> int:
    """Return how many threads of this rank read files."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MOST_THREADS, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
