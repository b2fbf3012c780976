"""A run on disk: its files by name. No file of another run is ever overwritten.

config.yaml          the resolved configuration
metrics.jsonl        one JSON object a record
tensorboard/         the same values
checkpoints/step-0000100/, latest
run.lock             while a process trains there (`bridge.training.run_files.lock`)
"""

import contextlib
import datetime
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.training.durable_files import replace_durably
from bridge.training.file_kinds import head_of, kind_of
from bridge.training.metric_loggers import read_records
from bridge.training.run_files.configuration import cause_of, read_config, read_config_text
from bridge.training.usage_error import UsageError

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
        """One JSON object a record."""
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
        """The lock file of the process that trains there."""
        return self.path / "run.lock"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint that was taken after `step` steps."""
        return self.checkpoints / f"step-{step:07d}"

    def holds_a_run(self) -> bool:
        """Whether anything but the lock is there already.

        Raises:
            UsageError: The path is no directory, or it cannot be read.
        """
        reject_non_directory(self.path, "checkpoint.run_dir")
        try:
            found = self.path.iterdir() if self.path.exists() else ()
            return any(entry != self.lock for entry in found)
        except OSError as error:
            raise UsageError(
                f"checkpoint.run_dir: {str(self.path)!r} cannot be read ({error.strerror}); choose "
                "another directory with --run-dir"
            ) from error

    def clear(self) -> None:
        """Remove the files of a new run that could not start, but for its lock."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry != self.lock:
                entry.unlink(missing_ok=True)

    def latest(self) -> Path | None:
        """Return the checkpoint that `latest` names, None when the run has saved none.

        Raises:
            UsageError: `latest` is missing where there are checkpoints, or names none of them.
        """
        latest, problem = self.look_up_latest()
        if problem is not None:
            raise UsageError(f"{problem}; {self.choices()}")
        return latest

    def look_up_latest(self) -> tuple[Path | None, str | None]:
        """Return the checkpoint that `latest` names, and the problem of `latest` if it has one."""
        pointer = self.checkpoints / "latest"
        if not os.path.lexists(pointer) and not self.saved():
            return None, None
        try:
            name = pointer.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None, f"{pointer}: is missing"
        except (OSError, UnicodeDecodeError) as error:
            return None, f"{pointer}: {cause_of(error)}"
        if not _STEP.fullmatch(name):
            return None, f"{pointer}: {name[:40]!r} is no checkpoint's name"
        if not (self.checkpoints / name).is_dir():
            return None, f"{pointer}: names {name}, which is not there"
        return self.checkpoints / name, None

    def checkpoint_to_resume(self, step: int | None) -> Path | None:
        """Return the checkpoint that a run continues from; None where it has saved none.

        Args:
            step: That of ``checkpoint.step``; None for the one that `latest` names.

        Raises:
            UsageError: There is no such checkpoint; or there is none at all, although the run has
                come far enough to save one.
        """
        if step is not None:
            if not self.checkpoint(step).is_dir():
                raise UsageError(
                    f"checkpoint.step={step}: {self.checkpoints} has no checkpoint of that step; "
                    f"{self.choices()}"
                )
            return self.checkpoint(step)
        latest = self.latest()
        if latest is None:
            self._reject_restart_of_saved_run()
        return latest

    def choices(self) -> str:
        """List the checkpoints to continue the run from, for the end of a message."""
        steps = [step_of(path) for path in self.saved()]
        if not steps:
            return "there is no checkpoint to continue from; start a new run with another --run-dir"
        listed = ", ".join(map(str, steps))
        return (
            f"there are checkpoints of the steps {listed}: continue from one with --resume --step "
            f"{steps[-1]} (checkpoint.step={steps[-1]})"
        )

    def saved_config(self) -> str:
        """Return the text of config.yaml.

        Raises:
            UsageError: It is missing or damaged; the message says where there is another.
        """
        return read_config_text(self.config, self.remedy_of_config())

    def check_presence(self) -> None:
        """Check during the run that its files are still there.

        Raises:
            FileNotFoundError: The directory was deleted or moved.
        """
        if not self.config.exists():
            raise FileNotFoundError(
                f"{self.path} was deleted or moved while the run goes on, and its metrics with it"
            )

    def set_metrics_aside(self) -> Path | None:
        """Rename metrics.jsonl before the run starts again at step 0; return its new path."""
        if not self.metrics.is_file() or not self.metrics.stat().st_size:
            return None
        taken = len(list(self.path.glob("metrics.before-restart-*.jsonl")))
        aside = self.path / f"metrics.before-restart-{taken + 1}.jsonl"
        self.metrics.rename(aside)
        return aside

    def remedy_of_config(self) -> str:
        """Return the remedy for a damaged config.yaml, for the end of a message."""
        if not (saved := self.saved()):
            return "start a new run with another --run-dir"
        source = saved[-1] / self.config.name
        # Else `cp` copies into a directory, and not at all through a link to nothing.
        in_the_way = self.config.is_dir() or self.config.is_symlink()
        return (
            f"take that of a checkpoint{', once what is there is moved away' if in_the_way else ''}"
            f": {shlex.join(['cp', str(source), str(self.config)])}"
        )

    def _reject_restart_of_saved_run(self) -> None:
        """Reject a start at step 0 where the records reach beyond the step of a checkpoint."""
        last = max((record["step"] for record in self.records()), default=0)
        interval = self._save_interval()
        if interval is not None and last > interval:
            raise UsageError(
                f"{self.checkpoints}: holds no checkpoint, and by {self.metrics.name} the run has "
                f"come to step {last} and saved every {interval}; put its checkpoints back, or "
                "start a new run with another --run-dir"
            )

    def _save_interval(self) -> int | None:
        """Return the steps between checkpoints of the run as it was started last."""
        if not self.config.exists():
            return None
        section = read_config(self.config, self.remedy_of_config()).get("checkpoint")
        interval = section.get("save_interval") if isinstance(section, dict) else None
        return interval if isinstance(interval, int) else None

    def publish(self, checkpoint: Path) -> None:
        """Make `latest` name a checkpoint whose data is durable, atomically."""
        replace_durably(self.checkpoints / "latest", checkpoint.name + "\n")

    def saved(self) -> list[Path]:
        """Return the finished checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if _STEP.fullmatch(path.name)]
        return sorted((path for path in found if path.is_dir()), key=lambda path: step_of(path))

    def records(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, without a torn last line.

        Raises:
            UsageError: It cannot be read, or a line is no record.
        """
        return read_records(self.metrics)


def reject_wrong_directory(directory: RunDirectory, *, resume: bool) -> None:
    """Reject a new run in the directory of another, and a resume where there is no run.

    Args:
        directory: The run's files.
        resume: Whether a run is to be continued.

    Raises:
        UsageError: With the remedy.
    """
    place, holds_a_run = str(directory.path), directory.holds_a_run()
    if holds_a_run and not resume:
        _, problem = directory.look_up_latest()
        how = (
            "continue it with --resume (checkpoint.resume=true) or choose another directory with "
            "--run-dir"
            if problem is None
            else f"{problem}; {directory.choices()}"
        )
        raise UsageError(f"checkpoint.run_dir: {place!r} holds a run already; {how}")
    if resume and not holds_a_run:
        raise UsageError(
            f"checkpoint.run_dir: {place!r} holds no run to resume; check the path, or start a new "
            "run without --resume"
        )


@contextlib.contextmanager
def writing_run_files(directory: RunDirectory) -> Iterator[None]:
    """Write the first files of a run in this block; an OSError becomes a UsageError.

    Raises:
        UsageError: The directory cannot be written.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or directory.path
        raise UsageError(
            f"checkpoint.run_dir: {str(directory.path)!r} cannot be written ({where}: "
            f"{error.strerror or error}); make room, or choose another directory with --run-dir"
        ) from error


def step_in_name(checkpoint: Path) -> int | None:
    """Return the number of steps that a folder is named for; None if it has another name."""
    match = _STEP.fullmatch(checkpoint.name)
    return None if match is None else int(match[1])


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint's folder is named for."""
    step = step_in_name(checkpoint)
    if step is None:
        raise UsageError(f"{checkpoint}: not a checkpoint; its name should be like step-0000100")
    return step


def new_run_name(recipe: str | None) -> str:
    """Return the default directory of a new run: runs/RECIPE-TIMESTAMP."""
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return str(Path("runs") / f"{recipe or 'run'}-{moment}")


def reject_non_directory(path: Path, field: str) -> None:
    """Reject a path that is a file, or a link to nothing.

    Args:
        path: The user's path; it need not exist.
        field: The user's name for it.

    Raises:
        UsageError: With the remedy.
    """
    if path.exists() and not path.is_dir():
        what = kind_of(head_of(path)) or "a file"
        raise UsageError(f"{field}: {str(path)!r} is {what}; give the directory of a run")
    if path.is_symlink() and not path.exists():
        raise UsageError(
            f"{field}: {str(path)!r} is a link to {os.readlink(path)!r}, which is not there; "
            "correct the link, or give another path"
        )


def find_checkpoint(path: str | Path, field: str) -> Path:
    """Return the checkpoint at a user's path: itself, or the latest of the run there.

    Raises:
        UsageError: There is no checkpoint; the message says what was found instead.
    """
    place = Path(path)
    reject_non_directory(place, field)
    if not place.exists():
        raise UsageError(f"{field}: {str(path)!r} does not exist; give a run or a checkpoint")
    # A checkpoint without .metadata is damaged, which its reader reports.
    if (place / ".metadata").exists() or _STEP.fullmatch(place.name) or any(place.glob("*.distcp")):
        return place
    directory = RunDirectory(place)
    latest, problem = directory.look_up_latest()
    if problem is not None:
        saved = directory.saved()
        remedy = f"give one of its checkpoints, such as {saved[-1]}" if saved else "give another"
        raise UsageError(f"{field}: {problem}; {remedy}")
    if latest is None and any(place.glob("*.safetensors")):
        raise UsageError(
            f"{field}: {str(path)!r} holds weights in Hugging Face's format; make a checkpoint of "
            f"them with `bridge import-hf {shlex.quote(str(path))} --output CHECKPOINT` and give "
            "that"
        )
    if latest is None:
        raise UsageError(
            f"{field}: {str(path)!r} holds no checkpoint; give a run's directory (with "
            "checkpoints/latest in it) or one of its checkpoints"
        )
    return latest
