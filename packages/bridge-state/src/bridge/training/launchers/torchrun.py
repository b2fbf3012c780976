"""torchrun, and launchers that set the same variables, such as Kubernetes operators.

The variables are ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.
"""

from collections.abc import Mapping
from typing import override

from bridge.training.launchers.launcher import Launcher, RankEnvironment, check_rank, read_number
from bridge.training.usage_error import UsageError

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Torchrun(Launcher):
    """torchrun's variables."""

    @override
    def has_started(self, given: Mapping[str, str]) -> bool:
        return "RANK" in given or given.get("WORLD_SIZE", "1") != "1"

    @override
    def rank_environment(self, given: Mapping[str, str]) -> RankEnvironment:
        if "RANK" not in given or "WORLD_SIZE" not in given:
            raise _incomplete(given)
        rank, world_size = read_number(given, "RANK"), read_number(given, "WORLD_SIZE")
        check_rank("RANK", rank, "WORLD_SIZE", world_size)
        return RankEnvironment(
            launcher="torchrun",
            rank=rank,
            world_size=world_size,
            local_rank=read_number(given, "LOCAL_RANK") if "LOCAL_RANK" in given else None,
        )

    @override
    def rendezvous_url(self, given: Mapping[str, str]) -> str:
        if any(name not in given for name in _REQUIRED):
            raise _incomplete(given)
        return "env://"


def _incomplete(given: Mapping[str, str]) -> UsageError:
    first = "RANK" if "RANK" in given else "WORLD_SIZE"
    missing = [name for name in _REQUIRED if name not in given]
    listed = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
    return UsageError(
        f"{first}={given[first]}: {listed} must be set too; start the ranks with "
        f"torchrun or srun, or unset {first} to train on one rank"
    )
