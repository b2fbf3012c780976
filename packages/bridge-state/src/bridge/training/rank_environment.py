"""The rank of this process as its launcher says it: torchrun's variables, or Slurm's.

torchrun, and Kubernetes operators like it, set ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
``MASTER_PORT`` and ``LOCAL_RANK``. srun sets ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS`` (older
versions ``SLURM_NTASKS`` alone) and ``SLURM_LOCALID``; the ranks then meet at the first host of the
step's node list, at a port that follows from job and step. Where both are there torchrun's count,
so ``srun torchrun ...`` works. A batch script may set ``MASTER_ADDR`` or ``MASTER_PORT`` itself.

A batch script, or a shell of ``salloc``, has Slurm's variables of the job and is no task of it:
what is started there without srun is one rank.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bridge.training.usage_error import UsageError

_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
_FIRST_PORT, _PORTS = 10_000, 20_000


@dataclass(kw_only=True, frozen=True)
class RankEnvironment:
    """The position of this process among the ranks that were started together."""

    launcher: Literal["torchrun", "Slurm"] | None = None
    """Who started the ranks; None for one process that nobody else belongs to."""
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """Its place among the ranks of this machine; None if nobody says."""
    note: str | None = None
    """A line for the user about what was taken from the environment."""


def rank_environment(variables: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Return what the launcher of this process says of its rank.

    Args:
        variables: The environment.

    Raises:
        UsageError: Some of the variables that belong together are missing, or they contradict each
            other.
    """
    given = {name: text for name, text in variables.items() if text}
    if not given.get("RANK") and _is_slurm_task(given):
        return _of_slurm(given)
    local_rank = _number(given, "LOCAL_RANK") if "LOCAL_RANK" in given else None
    if "RANK" not in given and given.get("WORLD_SIZE", "1") == "1":
        return RankEnvironment(local_rank=local_rank, note=_note_of_lone_process(given))
    if "RANK" not in given or "WORLD_SIZE" not in given:
        raise _half_set(given)
    rank, world_size = _number(given, "RANK"), _number(given, "WORLD_SIZE")
    _check_rank("RANK", rank, "WORLD_SIZE", world_size)
    return RankEnvironment(
        launcher="torchrun", rank=rank, world_size=world_size, local_rank=local_rank
    )


def rendezvous_url(variables: Mapping[str, str] = os.environ) -> str:
    """Return where the ranks that a launcher started meet, as `torch.distributed` takes it.

    Args:
        variables: The environment.

    Raises:
        UsageError: Nothing says where.
    """
    given = {name: text for name, text in variables.items() if text}
    if rank_environment(given).launcher == "torchrun":
        if "MASTER_ADDR" not in given or "MASTER_PORT" not in given:
            raise _half_set(given)
        return "env://"
    host = given.get("MASTER_ADDR")
    nodes = next((given[name] for name in _NODE_LISTS if name in given), None)
    if host is None and nodes is None:
        raise UsageError(
            "SLURM_STEP_NODELIST: nothing says where the tasks of the Slurm step meet; start them "
            "with srun, or set MASTER_ADDR to the host of task 0"
        )
    if "MASTER_PORT" not in given and "SLURM_JOB_ID" not in given:
        raise UsageError(
            "SLURM_JOB_ID: nothing says at which port the tasks of the Slurm step meet; start "
            "them with srun, or set MASTER_PORT to a free one"
        )
    # Jobs, and steps of a job, that share a host get different ones.
    number = _number(given, "SLURM_JOB_ID") * 31 + _number(given, "SLURM_STEP_ID")
    port = _number(given, "MASTER_PORT", _FIRST_PORT + number % _PORTS)
    return f"tcp://{host or first_host(nodes or '')}:{port}"


def first_host(nodes: str) -> str:
    """Return the first host of a node list of Slurm's, such as ``gpu[01-03,07],login1``."""
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _is_slurm_task(given: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks."""
    if "SLURM_PROCID" not in given or _tasks(given)[1] == 1:
        return False
    # sbatch says so of its script, which has the id of task 0 too.
    is_batch_script = given.get("ENVIRONMENT") == "BATCH" and given["SLURM_PROCID"] == "0"
    return any(name in given for name in _OF_STEP) or not is_batch_script


def _tasks(given: Mapping[str, str]) -> tuple[str, int]:
    """Return the number of tasks, and the variable that says it."""
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if name in given:
            return name, _number(given, name)
    return "SLURM_NTASKS", 1


def _of_slurm(given: Mapping[str, str]) -> RankEnvironment:
    name, world_size = _tasks(given)
    rank = _number(given, "SLURM_PROCID")
    _check_rank("SLURM_PROCID", rank, name, world_size)
    if _number(given, "WORLD_SIZE", world_size) != world_size:
        raise UsageError(
            f"WORLD_SIZE={given['WORLD_SIZE']}: Slurm has started {world_size} tasks ({name}); "
            "start torchrun in each of them, or unset WORLD_SIZE"
        )
    return RankEnvironment(
        launcher="Slurm",
        rank=rank,
        world_size=world_size,
        local_rank=_number(given, "SLURM_LOCALID") if "SLURM_LOCALID" in given else None,
        note=f"task {rank} of the {world_size} that Slurm has started",
    )


def _note_of_lone_process(given: Mapping[str, str]) -> str | None:
    name, tasks = _tasks(given)
    if tasks == 1 or any(step in given for step in _OF_STEP):
        return None
    return (
        f"one rank: the Slurm job has {tasks} tasks ({name}), and srun did not start this process; "
        "put srun in front to train on all of them"
    )


def _half_set(given: Mapping[str, str]) -> UsageError:
    start = "RANK" if "RANK" in given else "WORLD_SIZE"
    missing = [name for name in _OF_TORCHRUN if name not in given]
    return UsageError(
        f"{start}={given[start]}: {_listed(missing)} must be set too; start the ranks with "
        f"torchrun or srun, or unset {start} to train on one rank"
    )


def _check_rank(name: str, rank: int, name_of_size: str, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise UsageError(
            f"{name}={rank}: of {name_of_size}={world_size} ranks the last is {world_size - 1}; "
            "start the ranks with torchrun or srun"
        )


def _number(given: Mapping[str, str], name: str, default: int = 0) -> int:
    text = given.get(name)
    if not text:
        return default
    if not re.fullmatch(r"\d+", text):
        raise UsageError(f"{name}={text}: expected a number; it is set by torchrun or srun")
    return int(text)


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
