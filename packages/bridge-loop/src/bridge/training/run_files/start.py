"""The start of a run on disk: its directory is chosen and locked, its checkpoints are found."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from bridge.training.config import ConfigContainer
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.ranks.launcher_store import is_logging_rank
from bridge.training.run_files.directory import (
    RunDirectory,
    find_checkpoint,
    new_run_name,
    reject_wrong_directory,
)
from bridge.training.run_files.lock import directory_lock, rank_lock


@contextlib.contextmanager
def chosen_directory(
    config: ConfigContainer, control_group: dist.ProcessGroup, *, is_locked: bool
) -> Iterator[RunDirectory]:
    """Choose the run's directory, the same on every rank, and reject one that does not fit.

    Args:
        config: Its run directory is filled in.
        control_group: All ranks, over gloo.
        is_locked: Whether no other run may use it until the block is left.
    """
    # The ranks could not agree on a time of day.
    chosen = on_first_rank(
        lambda: config.checkpoint.run_dir or new_run_name(config.recipe), control_group
    )
    config.checkpoint.run_dir = chosen
    directory = RunDirectory(Path(chosen))
    with contextlib.ExitStack() as stack:

        def lock_and_check() -> None:
            if is_locked:
                stack.enter_context(directory_lock(directory.path))
            reject_wrong_directory(directory, resume=config.checkpoint.resume)

        # Other ranks may see a shared file system a moment later.
        on_first_rank(lock_and_check, control_group)
        if is_locked and not is_logging_rank():
            stack.enter_context(rank_lock(directory.path))
        yield directory


@contextlib.contextmanager
def cleared_on_failure(directory: RunDirectory, *, is_new: bool) -> Iterator[None]:
    """Remove the files of a new run again if it fails in this block, before its start."""
    try:
        yield
    except BaseException:
        # The directory was empty: a new run is rejected where there is anything.
        if is_new and is_logging_rank():
            directory.clear()
        raise


@dataclass(kw_only=True, frozen=True)
class StartingPoint:
    """The checkpoints that a run starts from."""

    resumed: Path | None
    """The run's own, which it continues from."""
    pretrained: Path | None
    """Another run's weights: the base of adapters, or initial weights."""

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are read."""
        return [path for path in (self.resumed, self.pretrained) if path is not None]


def find_starting_point(config: ConfigContainer, directory: RunDirectory) -> StartingPoint:
    """Find the checkpoints that a configuration asks for.

    Args:
        config: Its checkpoint.step is cleared.
        directory: The run's files.

    Raises:
        UsageError: There is no such checkpoint.
    """
    resumed = None
    if config.checkpoint.resume:
        resumed = directory.checkpoint_to_resume(config.checkpoint.step)
        # The configuration that is written is for a later start, which takes the latest.
        config.checkpoint.step = None
    path = config.checkpoint.pretrained_checkpoint
    # A run that continues needs the weights that it once started from only as the base of adapters.
    if path is None or (resumed is not None and config.peft is None):
        return StartingPoint(resumed=resumed, pretrained=None)
    pretrained = find_checkpoint(path, "checkpoint.pretrained_checkpoint")
    return StartingPoint(resumed=resumed, pretrained=pretrained)
