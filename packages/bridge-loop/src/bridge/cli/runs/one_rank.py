"""Training in this process, as one rank of a run."""

import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bridge.cli.runs.start_command import StartCommand
from bridge.training.launchers import rank_environment
from bridge.training.usage_error import is_usage_error

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer
    from bridge.training.contracts import Recipe


type Command = Literal["pretrain", "finetune"]


def train_here(
    command: "Command", recipe: "Recipe", config: "ConfigContainer", start: StartCommand
) -> int:
    """Train as one rank of a run; return the exit code.

    Args:
        command: The entry point that trains.
        recipe: The recipe, with the forward step and its callbacks.
        config: The resolved configuration.
        start: How the command was started.

    Raises:
        UsageError: A mistake of the user's.
        RankFailed: Any other failure; it has been printed.
    """
    from bridge.training.finetune import finetune
    from bridge.training.pretrain import pretrain

    train = {"pretrain": pretrain, "finetune": finetune}[command]
    failure = ""

    def report(error: BaseException, line: str) -> None:
        nonlocal failure
        if not is_usage_error(error):
            failure = line
            sys.stderr.write(f"bridge: {line}\n")

    def resume_line(run_dir: Path) -> str:
        return start.resume(command, recipe.name, run_dir)

    try:
        result = train(
            config,
            recipe.forward_step,
            recipe.callbacks(),
            on_failure=report,
            resume_line=resume_line,
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if is_usage_error(error):
            # `main` prints it in one line.
            raise
        if not failure:
            report(error, f"rank {rank_environment().rank}: {type(error).__name__}: {error}")
        # In one piece: other ranks may print at the same time.
        sys.stderr.write(traceback.format_exc())
        raise RankFailed(failure, int(getattr(error, "exit_code", 1))) from error
    # A time limit is the user's own: reaching it is a success.
    planned = result.reason in ("finished", "time limit")
    return 0 if planned else 128 + signal.Signals[result.reason]


class RankFailed(Exception):
    """The failure of this rank; it has been printed with its rank and its traceback."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
