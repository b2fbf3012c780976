"""A launcher: a program that starts the ranks of a run and names each in its environment."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from bridge.training.usage_error import UsageError


@dataclass(kw_only=True, frozen=True)
class RankEnvironment:
    """The position of this process among the ranks that were started together."""

    launcher: str | None = None
    """The launcher of the ranks, "torchrun" or "Slurm"; None for a process that has no others."""
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """The rank among those of this machine; None if it is not known."""
    start_words: tuple[str, ...] = ()
    """The words before a command that start it on all ranks, such as srun."""
    may_see_own_gpu_alone: bool = False
    """Whether each of several ranks on a machine may see a single GPU, its own."""
    note: str | None = None
    """A line for the user about what was taken from the environment."""


class Launcher(ABC):
    """One launcher. Its methods take the environment without the variables that are empty."""

    @abstractmethod
    def has_started(self, given: Mapping[str, str]) -> bool:
        """Whether the variables say that this launcher started the process as a rank."""

    @abstractmethod
    def rank_environment(self, given: Mapping[str, str]) -> RankEnvironment:
        """Return the rank of the process.

        Raises:
            UsageError: Variables are missing, or they contradict each other.
        """

    @abstractmethod
    def rendezvous_url(self, given: Mapping[str, str]) -> str:
        """Return the address where the ranks meet, as `torch.distributed` takes it.

        Raises:
            UsageError: Nothing says where.
        """

    def note_without(self, given: Mapping[str, str]) -> str | None:
        """Return a line for a user who probably forgot to start with this launcher, else None."""
        return None


def read_number(given: Mapping[str, str], name: str, default: int = 0) -> int:
    """Return the value of a variable, `default` if it is not set.

    Raises:
        UsageError: It is not a number.
    """
    text = given.get(name)
    if not text:
        return default
    if not re.fullmatch(r"\d+", text):
        raise UsageError(f"{name}={text}: expected a number; it is set by torchrun or srun")
    return int(text)


def check_rank(name: str, rank: int, name_of_size: str, world_size: int) -> None:
    """Reject a rank that is not one of the `world_size` ranks."""
    if not 0 <= rank < world_size:
        raise UsageError(
            f"{name}={rank}: of {name_of_size}={world_size} ranks the last is {world_size - 1}; "
            "start the ranks with torchrun or srun"
        )
