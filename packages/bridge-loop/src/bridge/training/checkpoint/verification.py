"""The verification of checkpoints: their files are compared with the manifest while they are read.

Nothing that was read is used before the comparison has ended. The message about damage names the
newest older checkpoint without damage.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from bridge.training.checkpoint.manifest import (
    MANIFEST,
    DamagedManifest,
    Manifest,
    reading_threads,
)
from bridge.training.ranks.collectives import from_every_rank, on_first_rank
from bridge.training.run_files.directory import RunDirectory, step_in_name, step_of
from bridge.training.usage_error import UsageError

_logger = logging.getLogger(__name__)


class DamagedCheckpoint(UsageError):
    """A checkpoint's files are not those that were written."""


class Verification:
    """Compares checkpoints with their manifests while they are read.

    Names, sizes and small files are compared at once, before anything is read; the tensors' files
    in the background, divided over the ranks. The caller reads within `explaining_errors`, calls
    `finish` before it uses anything, and `close` at the end, also after an error.

    Args:
        checkpoints: The folders.
        group: All ranks of the run, which all make the same calls; None for one process.

    Raises:
        DamagedCheckpoint: On every rank, with file, cause and the newest older checkpoint to use.
    """

    def __init__(self, checkpoints: Sequence[Path], group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self._is_shared = size > 1

        def check() -> list[Manifest | None]:
            return [_checked(path) for path in checkpoints]

        manifests = on_first_rank(check, group) if self._is_shared else check()
        self._blocks = [
            (manifest, name, block)
            for manifest in manifests
            if manifest is not None
            for name, block in manifest.blocks()
            if name.endswith(".distcp")
        ]
        self._pool = ThreadPoolExecutor(reading_threads(), thread_name_prefix="verification")
        self._own = set(range(rank, len(self._blocks), size))
        self._results: dict[int, Future[str | None]] = {
            index: self._pool.submit(Manifest.compare, *self._blocks[index]) for index in self._own
        }

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Read a checkpoint in this block: an error that damage caused is raised as damage."""
        try:
            yield
        except Exception as error:
            # This rank alone may have failed, so it looks at all files by itself.
            for index in set(range(len(self._blocks))) - self._own:
                self._results[index] = self._pool.submit(Manifest.compare, *self._blocks[index])
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
        messages = from_every_rank(found, self._group) if self._is_shared else [found]
        for message in messages:
            if message is not None:
                raise DamagedCheckpoint(message)

    def _find_damage(self) -> str | None:
        for index in sorted(self._results):
            if (cause := self._results[index].result()) is not None:
                manifest, name, _ = self._blocks[index]
                return _message(manifest.checkpoint, name, cause)
        return None


@contextlib.contextmanager
def verified(*checkpoints: Path) -> Iterator[None]:
    """Read checkpoints by one process in this block; it raises where they are damaged.

    Raises:
        DamagedCheckpoint: With file and cause, in place of the error that damage caused.
    """
    with (
        contextlib.closing(Verification(checkpoints)) as verification,
        verification.explaining_errors(),
    ):
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


def is_undamaged(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are those that were written; reads all of them."""
    try:
        manifest = Manifest.read(checkpoint)
    except UsageError:
        return False
    if manifest is None:
        return (checkpoint / ".metadata").exists()
    if manifest.find_problem() is not None:
        return False
    with ThreadPoolExecutor(reading_threads()) as pool:
        return not any(pool.map(lambda block: manifest.compare(*block), manifest.blocks()))


def newest_undamaged(folder: Path, before: int | None = None) -> Path | None:
    """Return the newest undamaged checkpoint in a run's folder of checkpoints; None without one.

    Args:
        folder: The run's ``checkpoints``.
        before: Consider only those of earlier steps.
    """
    known = RunDirectory(folder.parent).saved() if folder.name == "checkpoints" else []
    for path in reversed(known):
        if (before is None or step_of(path) < before) and is_undamaged(path):
            return path
    return None


def missing_records(run: RunDirectory, checkpoint: Path) -> Iterator[str]:
    """Yield a line where metrics.jsonl lacks records that it had when a checkpoint was saved."""
    manifest = _read(checkpoint)
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
    manifest = _read(checkpoint)
    if manifest is None:
        if not (checkpoint / ".metadata").exists():
            raise DamagedCheckpoint(_message(checkpoint, ".metadata", "is missing"))
        _warn_of_no_manifest(checkpoint)
    elif (problem := manifest.find_problem()) is not None:
        raise DamagedCheckpoint(_message(checkpoint, *problem))
    return manifest


def _read(checkpoint: Path) -> Manifest | None:
    try:
        return Manifest.read(checkpoint)
    except DamagedManifest as error:
        raise DamagedCheckpoint(_message(checkpoint, MANIFEST, error.cause)) from error


@functools.cache
def _warn_of_no_manifest(checkpoint: Path) -> None:
    _logger.warning(
        "%s: has no %s, as an older version wrote it: damage of its files is not found",
        checkpoint,
        MANIFEST,
    )


def _message(checkpoint: Path, name: str, cause: str) -> str:
    step = step_in_name(checkpoint)
    older = None if step is None else newest_undamaged(checkpoint.parent, before=step)
    if older is None:
        remedy = (
            "there is no older complete checkpoint; take another copy of it, or start a new run"
        )
    else:
        remedy = (
            f"the newest older complete checkpoint is {older}: give that, or continue from it with "
            f"--resume --step {step_of(older)} (checkpoint.step={step_of(older)})"
        )
    return f"{checkpoint / name}: {cause}, so the checkpoint is damaged; {remedy}"
