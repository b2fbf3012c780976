"""The launch of local ranks (``--nproc``), through torchrun's elastic launcher.

On a CPU the ranks are forked from this process, which has imported everything: they start at once.
On GPUs each is a process of its own, as CUDA does not survive a fork. Either way they are in
process groups of their own, so that a Ctrl-C reaches each of them exactly once: this process
passes its signals on. If it is killed, the ranks end themselves.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from bridge.cli.runs.local_rank import POLL_SECONDS, Launcher, train_as_forked_rank

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from bridge.cli.runs.one_rank import Command
    from bridge.cli.runs.start_command import StartCommand
    from bridge.training.config import ConfigContainer
    from bridge.training.contracts import Recipe

_GRACE_SECONDS = 1.0


def on_local_ranks(
    ranks: int,
    command: "Command",
    recipe: "Recipe",
    config: "ConfigContainer",
    start: "StartCommand",
) -> int:
    """Train on `ranks` processes of this machine; return the exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    from bridge.training.run_files.directory import new_run_name
    from bridge.training.run_files.lock import directory_lock

    # Ranks would choose different names, by the time of day.
    config.checkpoint.run_dir = config.checkpoint.run_dir or new_run_name(config.recipe)
    # The launcher would report each failed rank again, after the rank itself has.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with tempfile.TemporaryDirectory(prefix="bridge-") as folder:
        launcher = Launcher(os.getpid(), Path(folder), start)
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            monitor_interval=POLL_SECONDS,
            start_method="fork",
            # The launcher would leave a directory of its own behind.
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGQUIT",
        )
        with directory_lock(Path(config.checkpoint.run_dir)), _signals_passed_on(launcher):
            return _launch(settings, launcher, command, recipe, config)


def _launch(
    settings: "LaunchConfig",
    launcher: "Launcher",
    command: "Command",
    recipe: "Recipe",
    config: "ConfigContainer",
) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from bridge.training.ranks.groups import choose_device

    try:
        if choose_device(config.dist.device) == "cpu":
            elastic_launch(settings, train_as_forked_rank)(launcher, command, recipe, config)
        else:
            path = launcher.folder / "config.yaml"
            path.write_text(config.to_yaml())
            elastic_launch(settings, sys.executable)(
                *("-m", "bridge.cli.runs.rank", str(launcher.pid), command, recipe.name, str(path)),
                *(str(launcher.start.nproc), *launcher.start.words),
            )
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _explain(launcher, rank, failure.exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _explain(launcher: Launcher, rank: int, code: int) -> int:
    """Print why the run failed, first on `rank` with `code`; return the exit code."""
    if launcher.is_to_end_at_once():
        return 128 + signal.SIGINT
    if code < 0:
        # The number of the signal that killed the rank.
        if -code not in launcher.signals:
            name = signal.Signals(-code).name
            print(f"bridge: rank {rank} was killed by {name}", file=sys.stderr)
        return 128 - code
    reports = launcher.reports()
    if not reports:
        return code
    mistakes = [report["message"] for report in reports if report["code"] == 2]
    # Every rank finds the same mistake; that the others lost a rank is no news.
    message = mistakes[0] if mistakes else f"the first failure was {reports[0]['message']}"
    print(f"bridge: {message}", file=sys.stderr)
    return 2 if mistakes else int(reports[0]["code"])


@contextlib.contextmanager
def _signals_passed_on(launcher: Launcher) -> Iterator[None]:
    import psutil

    from bridge.training.ranks.stop_request import SECONDS_OF_ONE_INTERRUPT, signals_to_catch

    this = psutil.Process()

    last_interrupt = float("-inf")

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal last_interrupt
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - last_interrupt < SECONDS_OF_ONE_INTERRUPT:
                return
            last_interrupt = now
        launcher.signals.append(number)
        if os.getpid() != launcher.pid:
            return  # A rank that is being forked; it raises the signals that it missed.
        children = this.children()
        if not children:
            # Not an exception: code that waits for the ranks might catch it.
            shutil.rmtree(launcher.folder, ignore_errors=True)
            os._exit(128 + number)
        send(children, number)
        if launcher.is_to_end_at_once():
            # A rank within a collective gets two signals as one, and later. The data loading
            # workers of a killed rank would keep this process waiting.
            threading.Timer(_GRACE_SECONDS, kill_all).start()

    def kill_all() -> None:
        send(this.children(recursive=True), signal.SIGKILL)

    def send(children: list[psutil.Process], number: int) -> None:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in signals_to_catch()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
