"""The rank of this process, as the launcher that started it says in the environment.

A launcher is a module here with a `Launcher`, and a line in ``_LAUNCHERS``.
"""

import os
from collections.abc import Mapping

from bridge.training.launchers.launcher import Launcher, RankEnvironment, read_number
from bridge.training.launchers.slurm import Slurm
from bridge.training.launchers.torchrun import Torchrun
from bridge.training.usage_error import UsageError

__all__ = ["RankEnvironment", "rank_environment", "rendezvous_url"]

# The first that has started this process counts.
_LAUNCHERS: tuple[Launcher, ...] = (Slurm(), Torchrun())


def rank_environment(variables: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Return the rank of this process; without a launcher it is the only one.

    Args:
        variables: The environment.

    Raises:
        UsageError: Some of the variables that belong together are missing, or they contradict each
            other.
    """
    given = _given(variables)
    if (launcher := _launcher_of(given)) is not None:
        return launcher.rank_environment(given)
    notes = (launcher.note_without(given) for launcher in _LAUNCHERS)
    return RankEnvironment(
        local_rank=read_number(given, "LOCAL_RANK") if "LOCAL_RANK" in given else None,
        note=next((note for note in notes if note is not None), None),
    )


def rendezvous_url(variables: Mapping[str, str] = os.environ) -> str:
    """Return the address where the ranks of a launcher meet, as `torch.distributed` takes it.

    Args:
        variables: The environment.

    Raises:
        UsageError: Nothing says where.
    """
    given = _given(variables)
    if (launcher := _launcher_of(given)) is None:
        raise UsageError("RANK: no launcher started this process; start it with torchrun or srun")
    return launcher.rendezvous_url(given)


def _launcher_of(given: Mapping[str, str]) -> Launcher | None:
    return next((launcher for launcher in _LAUNCHERS if launcher.has_started(given)), None)


def _given(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set to something."""
    return {name: text for name, text in variables.items() if text}
