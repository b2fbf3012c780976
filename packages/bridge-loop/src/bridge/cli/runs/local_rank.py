"""A local rank that ``--nproc`` starts, and its view of the launcher."""

import gc
import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.cli.output import flush_output
from bridge.training.durable_files import replace_durably

if TYPE_CHECKING:
    from bridge.cli.runs.one_rank import Command
    from bridge.cli.runs.start_command import StartCommand
    from bridge.training.config import ConfigContainer
    from bridge.training.contracts import Recipe

POLL_SECONDS = 0.1
"""Time between the launcher's looks at its ranks."""


@dataclass(frozen=True)
class Launcher:
    """The process that started the ranks."""

    pid: int
    folder: Path
    """The folder in which ranks write the reports of their failures."""
    start: "StartCommand"
    """The words that started the command, to continue the run with."""
    signals: list[int] = field(default_factory=list)
    """Those that asked to stop: in the launcher all that it passed on, in a forked rank those that
    came before its handlers were set."""

    def is_to_end_at_once(self) -> bool:
        """Whether Ctrl-C was pressed a second time."""
        return self.signals.count(signal.SIGINT) > 1

    def report(self, code: int, message: str) -> None:
        """Write a report that this rank fails."""
        report = {"time": time.time(), "code": code, "message": message}
        replace_durably(self.folder / f"rank-{os.environ['RANK']}.json", json.dumps(report))

    def reports(self) -> list[dict[str, Any]]:
        """Return the reports of the ranks, first failure first."""
        found = [json.loads(path.read_text()) for path in self.folder.glob("rank-*.json")]
        return sorted(found, key=lambda report: report["time"])


def train_as_forked_rank(
    launcher: Launcher, command: "Command", recipe: "Recipe", config: "ConfigContainer"
) -> None:
    """Train as a rank that was forked from the launcher; end the process if that fails."""
    import torch

    from bridge.training.ranks.stop_request import signals_to_catch

    # In each rank a collection would copy every page with objects of imported modules.
    gc.freeze()
    try:
        # A process of its own, as on GPUs, is the leader of a session of its own already.
        os.setpgid(0, 0)
        for number in signals_to_catch():
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        for missed in launcher.signals:
            signal.raise_signal(missed)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        code = train_as_rank(launcher, command, recipe, config)
    except KeyboardInterrupt:
        # To the launcher a rank that ends by this exception would still be running.
        code = int(128 + signal.SIGINT)
    flush_output()
    if code:
        # An exit, not an exception, which the launcher would report a second time.
        os._exit(code)


def train_as_rank(
    launcher: Launcher, command: "Command", recipe: "Recipe", config: "ConfigContainer"
) -> int:
    """Train as one of the local ranks of `launcher`; return the exit code."""
    from bridge.cli.runs.one_rank import RankFailed, train_here
    from bridge.training.run_files.lock import launcher_lock
    from bridge.training.usage_error import is_usage_error

    _end_with(launcher)
    assert config.checkpoint.run_dir is not None
    try:
        with launcher_lock(Path(config.checkpoint.run_dir)):
            return train_here(command, recipe, config, launcher.start)
    except RankFailed as failure:
        launcher.report(failure.code, str(failure))
        # A killed rank leaves no report: let the launcher see it before the ranks that lost it.
        time.sleep(5 * POLL_SECONDS)
        return failure.code
    except Exception as error:
        if not is_usage_error(error):
            raise
        launcher.report(2, str(error))
        return 2


def _end_with(launcher: Launcher) -> None:
    """End this rank when its launcher has been killed: no signal would reach it any more."""

    def watch() -> None:
        while os.getppid() == launcher.pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
