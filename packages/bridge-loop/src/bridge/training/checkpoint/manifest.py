"""The manifest of a checkpoint: size and checksums of its files, by which damage is found.

It is the last file of a checkpoint to be written. A checksum is the CRC-32 of a block of 64 MiB, so
that several threads share a large file.
"""

import dataclasses
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from bridge.training.durable_files import replace_durably, sync_file
from bridge.training.run_files.configuration import has_end
from bridge.training.run_files.directory import step_in_name
from bridge.training.usage_error import UsageError

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


class DamagedManifest(UsageError):
    """A manifest that is missing although there was one, or cannot be read."""

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.cause = cause


def record_files(paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Return the records of files, by their names; several threads read them."""
    sizes = {path: path.stat().st_size for path in paths}
    with ThreadPoolExecutor(reading_threads()) as pool:
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
            DamagedManifest: It is missing although there was one, or it cannot be read.
            UsageError: It is of another version.
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
                raise DamagedManifest(path, "is missing") from error
            return None
        except UsageError:
            raise
        except OSError as error:
            cause = f"cannot be read ({error.strerror})"
            raise DamagedManifest(path, cause) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            cause = f"is no complete manifest ({type(error).__name__}: {error})"
            raise DamagedManifest(path, cause) from error

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


def reading_threads() -> int:
    """Return the number of threads with which this rank reads files."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MOST_THREADS, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
