"""The run on disk: where its files are, and the rule that nothing is ever overwritten.

config.yaml          the resolved configuration
metrics.jsonl        one JSON object a logged step
tensorboard/         the same values
checkpoints/step-0000100/, latest
run.lock             while a process trains there (`bridge.training.run_lock`)
"""

import contextlib
import datetime
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.training.file_kinds import head_of, kind_of
from bridge.training.metric_loggers import as_logged
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer

_STEP = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run, by name."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint, and the file `latest`."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """What the process holds that trains there."""
        return self.path / "run.lock"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint that was taken after `step` steps."""
        return self.checkpoints / f"step-{step:07d}"

    def holds_a_run(self) -> bool:
        """Whether something is there already; an empty folder is free, also one that is claimed."""
        if not self.path.is_dir():
            return self.path.exists()
        return any(entry != self.lock for entry in self.path.iterdir())

    def clear(self) -> None:
        """Remove what a new run that did not come to its start has written; the claim remains."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry != self.lock:
                entry.unlink(missing_ok=True)

    def latest(self) -> Path | None:
        """Return the newest durable checkpoint, None when the run has saved none.

        Raises:
            UsageError: `latest` names a checkpoint that is not there.
        """
        pointer = self.checkpoints / "latest"
        if not pointer.exists():
            return None
        checkpoint = self.checkpoints / pointer.read_text().strip()
        if not checkpoint.is_dir():
            raise UsageError(
                f"{pointer}: names {checkpoint.name}, which is not there; write the name of one of "
                f"{[path.name for path in self.saved()]} into it, or start a new run"
            )
        return checkpoint

    def publish(self, checkpoint: Path) -> None:
        """Make `latest` name a checkpoint whose data is durable, atomically."""
        replace_durably(self.checkpoints / "latest", checkpoint.name + "\n")

    def saved(self) -> list[Path]:
        """Return the finished checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if _STEP.fullmatch(path.name)]
        return sorted(found, key=lambda path: step_of(path))

    def rows_of(self, step: int) -> list[dict[str, Any]]:
        """Return what was logged of a step (`as_logged`); a torn last line is none."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(as_logged(json.loads(line)))
        return [row for row in rows if row["step"] == step]


def refuse_wrong_directory(directory: RunDirectory, *, resume: bool, holds_a_run: bool) -> None:
    """Refuse to start a run where one is, or to continue one that is not there.

    Args:
        directory: Where the run is to live.
        resume: Whether a run is to be continued.
        holds_a_run: What `RunDirectory.holds_a_run` said, on the rank that looked.

    Raises:
        UsageError: With the remedy.
    """
    place = str(directory.path)
    if holds_a_run and not resume:
        raise UsageError(
            f"checkpoint.run_dir: {place!r} holds a run already; continue it with --resume "
            "(checkpoint.resume=true) or choose another directory with --run-dir"
        )
    if resume and not holds_a_run:
        raise UsageError(
            f"checkpoint.run_dir: {place!r} holds no run to resume; check the path, or start a new "
            "run without --resume"
        )


def refuse_another_command(directory: RunDirectory, config: "ConfigContainer") -> None:
    """Reject the continuation of a run by another entry point than the one that made it.

    Args:
        directory: Where the run is.
        config: The configuration of this start; its `command` is the entry point.

    Raises:
        UsageError: With the remedy, or the run's configuration cannot be read.
    """
    from bridge.training.config.yaml_text import load_yaml

    if not config.checkpoint.resume or config.command is None or not directory.config.exists():
        return
    try:
        saved = load_yaml(directory.config.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{directory.config}: cannot be read ({error})") from error
    made_by = saved.get("command") if isinstance(saved, Mapping) else None
    # Runs from before this was recorded tell nothing.
    if made_by not in (None, config.command):
        raise UsageError(
            f"checkpoint.run_dir={str(directory.path)!r}: it holds a run of {made_by}, and "
            f"{config.command} would continue it as another; use `bridge {made_by}`, or start a "
            "new run"
        )


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint's folder is named for."""
    match = _STEP.fullmatch(checkpoint.name)
    if match is None:
        raise UsageError(f"{checkpoint}: not a checkpoint; its name should be like step-0000100")
    return int(match[1])


def new_run_name(recipe: str | None) -> str:
    """Return the default directory of a new run: runs/RECIPE-TIMESTAMP."""
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return str(Path("runs") / f"{recipe or 'run'}-{moment}")


def find_checkpoint(path: str | Path, field: str) -> Path:
    """Return the checkpoint that a user's path means: itself, or the latest of the run there.

    Raises:
        UsageError: There is no checkpoint; the message says what was found instead.
    """
    place = Path(path)
    if not place.exists():
        raise UsageError(f"{field}: {str(path)!r} does not exist; give a run or a checkpoint")
    if place.is_file():
        what = kind_of(head_of(place)) or "a file"
        raise UsageError(
            f"{field}: {str(path)!r} is {what}; give the directory of a run or of a checkpoint"
        )
    if (place / ".metadata").exists():
        return place
    latest = RunDirectory(place).latest()
    if latest is None and any(place.glob("*.safetensors")):
        raise UsageError(
            f"{field}: {str(path)!r} holds weights in Hugging Face's format; make a checkpoint of "
            f"them with `bridge import-hf {path} --output CHECKPOINT` and give that"
        )
    if latest is None:
        raise UsageError(
            f"{field}: {str(path)!r} holds no checkpoint; give a run's directory (with "
            "checkpoints/latest in it) or one of its checkpoints"
        )
    return latest


@contextlib.contextmanager
def new_folder(path: Path, field: str) -> Iterator[Path]:
    """Fill a folder that is there, under its name, only when it is complete and durable.

    Yields the folder under another name. If the block fails, nothing is left.

    Args:
        path: What the folder is to be called; folders above it are made.
        field: What the user calls it, for the message.

    Raises:
        UsageError: There is something already.
    """
    if path.exists():
        raise UsageError(f"{field}: {str(path)!r} exists and is not overwritten; give a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(path.parent)


def replace_durably(path: Path, text: str) -> None:
    """Write a small file such that a reader sees the old content or the new, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def sync_tree(path: Path) -> None:
    """Make every file below a directory durable."""
    for folder, _, files in os.walk(path):
        for name in files:
            with _opened(Path(folder) / name) as descriptor:
                os.fsync(descriptor)
        sync_directory(Path(folder))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
