"""The command line that started this process, as its user typed it, to continue the run with."""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bridge.training.launchers import rank_environment

_MODULE_OF_TORCHRUN = "torch.distributed.run"


@dataclass(frozen=True)
class StartCommand:
    """The words with which the command was started, without its own arguments."""

    words: tuple[str, ...]
    """Such as ("bridge",), ("uv", "run", "bridge") or ("python", "-m", "bridge.cli")."""
    nproc: int | None = None
    """The local ranks that it was asked for."""

    @classmethod
    def of_this_process(cls, arguments: Sequence[str], nproc: int | None) -> Self:
        """Return the command line of this process, that of uv or torchrun if they started it.

        Args:
            arguments: Those of the command itself, which end the command lines of all of them.
            nproc: Local ranks.
        """
        words = _before(sys.orig_argv, arguments)
        if words is None:
            return cls(("bridge",), nproc)
        import psutil

        with contextlib.suppress(psutil.Error):
            for ancestor in psutil.Process().parents():
                outer = _before(ancestor.cmdline(), arguments)
                if outer is None:
                    break
                if outer[:1] in (("uv",), ("torchrun",)) or _MODULE_OF_TORCHRUN in outer:
                    words = outer
        return cls((*rank_environment().start_words, *words), nproc)

    def resume(self, command: str, recipe: str, run_dir: Path) -> str:
        """Return the line that continues a run, for a shell in the directory of the start."""
        words = [*self.words, command, recipe, "--run-dir", str(run_dir), "--resume"]
        if self.nproc is not None and self.nproc > 1:
            words += ["--nproc", str(self.nproc)]
        return shlex.join(words)


def _before(line: Sequence[str], arguments: Sequence[str]) -> tuple[str, ...] | None:
    """Return the words of a command line before the arguments; None if it ends otherwise."""
    count = len(line) - len(arguments)
    if count < 1 or list(line[count:]) != list(arguments):
        return None
    words = list(line[:count])
    is_script = len(words) > 1 and not words[1].startswith("-")
    if is_script and Path(words[0]).name.startswith("python"):
        # The system puts the interpreter in front of a script: nobody typed it.
        words = words[1:]
    return (_typed(words[0]), *words[1:])


def _typed(program: str) -> str:
    """Return a program's name alone where the shell finds it by that."""
    found = shutil.which(Path(program).name)
    is_found = found is not None and os.path.exists(program) and os.path.samefile(found, program)
    return Path(program).name if is_found else program
