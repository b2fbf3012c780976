"""The ``bridge`` command, run as a user runs it, without the seconds that its imports take.

Each command is a fork of the test's process, which has imported everything. It has its own standard
streams and its own process group, so that signals have the same effect as for a user.
"""

import contextlib
import gc
import importlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from ranks import die_with_parent, import_megatron_once

_WARM_MODULES = (
    "bridge.cli",
    "bridge.training.pretrain",
    "bridge.gpt.recipes",
    "bridge.mimo.recipes",
    "torch.distributed.launcher.api",
    "torch.utils.tensorboard",
)
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code (minus the signal that killed it) and its output."""

    code: int
    out: str
    err: str


@dataclass
class Command:
    """A running command."""

    pid: int
    folder: Path
    _code: int | None = field(default=None)

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return (self.folder / "stderr").read_text(errors="replace")

    def send(self, number: int, *, to_group: bool = False) -> None:
        """Send a signal to the process, or to its group as a terminal does."""
        if to_group:
            os.killpg(self.pid, number)
        else:
            os.kill(self.pid, number)

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is None

    def wait(self, timeout: float = 90) -> Ended:
        """Wait for its end; past `timeout` seconds it is killed and the test fails."""
        deadline = time.monotonic() + timeout
        while self.is_running():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no end after {timeout} s; it said\n{self.out}\n{self.err}")
            time.sleep(0.02)
        assert self._code is not None
        return Ended(self._code, self.out, self.err)

    def wait_for(self, path: Path, lines: int, timeout: float = 90) -> None:
        """Wait until a file that it writes has `lines` lines."""
        deadline = time.monotonic() + timeout
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            if not self.is_running() or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"{path} never came so far; it said\n{self.out}\n{self.err}")
            time.sleep(0.005)

    def descendants(self) -> list[int]:
        """Return the processes that it has started, and those that they have."""
        import psutil

        return [process.pid for process in psutil.Process(self.pid).children(recursive=True)]

    def kill(self) -> None:
        """Kill it and all processes that it has started."""
        if not self.is_running():
            return
        for pid in [*self.descendants(), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._code = -signal.SIGKILL


@cache
def _import_everything_once() -> None:
    import_megatron_once()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _WARM_MODULES:
            # A package that is installed alone lacks those that depend on it.
            if find_spec(name.rpartition(".")[0]) and find_spec(name):
                importlib.import_module(name)


def start(
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    output: int | None = None,
) -> Command:
    """Start ``bridge`` with `folder` as working directory.

    Its streams go to files in `folder`, standard output to the descriptor `output` if given.
    """
    _import_everything_once()
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # The test runner's own threads; the child never returns to code that waits for them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _be_command(arguments, folder, environment or {}, output)
    return Command(pid, folder)


def run(
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 90,
) -> Ended:
    """Run ``bridge`` to its end."""
    return start(*arguments, folder=folder, environment=environment).wait(timeout)


def _be_command(
    arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str], output: int | None
) -> NoReturn:
    code: Any = 70
    # A garbage collection would copy the pages of all imported modules.
    gc.freeze()
    try:
        os.setpgid(0, 0)
        die_with_parent()
        _take_streams(folder, output)
        os.chdir(folder)
        of_slurm = [name for name in os.environ if name.startswith("SLURM_")]
        for name in (*_LAUNCHER_VARIABLES, *of_slurm):
            os.environ.pop(name, None)
        os.environ.update(environment)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            default = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # As Python starts: https://docs.python.org/3.12/library/warnings.html#default-warning-filter
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        from bridge.cli import main

        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = end.code
    except BaseException:
        traceback.print_exc()
        code = 130 if isinstance(sys.exception(), KeyboardInterrupt) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _take_streams(folder: Path, output: int | None) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    if output is not None:
        os.dup2(output, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
