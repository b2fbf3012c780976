"""Slurm: the tasks that srun starts are ranks.

srun sets ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS`` (older versions only ``SLURM_NTASKS``) and
``SLURM_LOCALID``. The ranks meet at the first host of the step's node list, at a port that follows
from the ids of job and step; a batch script may set ``MASTER_ADDR`` or ``MASTER_PORT`` itself.

Two kinds of processes have Slurm's variables and are none of its ranks:

- those of torchrun in ``srun torchrun ...``, where torchrun's variables count;
- a batch script or a shell of ``salloc``, which have the job's variables: a command that is started
  there without srun is one rank.
"""

import re
from collections.abc import Mapping
from typing import override

from bridge.training.launchers.launcher import Launcher, RankEnvironment, check_rank, read_number
from bridge.training.usage_error import UsageError

_OF_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
_FIRST_PORT, _PORTS = 10_000, 20_000


class Slurm(Launcher):
    """Slurm's variables."""

    @override
    def has_started(self, given: Mapping[str, str]) -> bool:
        if "RANK" in given or "SLURM_PROCID" not in given or _tasks(given)[1] == 1:
            return False
        # sbatch marks its script as BATCH; the script has the id of task 0 too.
        is_batch_script = given.get("ENVIRONMENT") == "BATCH" and given["SLURM_PROCID"] == "0"
        return _is_in_step(given) or not is_batch_script

    @override
    def rank_environment(self, given: Mapping[str, str]) -> RankEnvironment:
        name, world_size = _tasks(given)
        rank = read_number(given, "SLURM_PROCID")
        check_rank("SLURM_PROCID", rank, name, world_size)
        if read_number(given, "WORLD_SIZE", world_size) != world_size:
            raise UsageError(
                f"WORLD_SIZE={given['WORLD_SIZE']}: Slurm has started {world_size} tasks ({name}); "
                "start torchrun in each of them, or unset WORLD_SIZE"
            )
        return RankEnvironment(
            launcher="Slurm",
            rank=rank,
            world_size=world_size,
            local_rank=read_number(given, "SLURM_LOCALID") if "SLURM_LOCALID" in given else None,
            start_words=("srun",),
            # In a step with --gpus-per-task.
            may_see_own_gpu_alone=True,
            note=f"task {rank} of the {world_size} that Slurm has started",
        )

    @override
    def rendezvous_url(self, given: Mapping[str, str]) -> str:
        host = given.get("MASTER_ADDR")
        nodes = next((given[name] for name in _NODE_LISTS if name in given), None)
        if host is None and nodes is None:
            raise UsageError(
                "SLURM_STEP_NODELIST: nothing says where the tasks of the Slurm step meet; start "
                "them with srun, or set MASTER_ADDR to the host of task 0"
            )
        if "MASTER_PORT" not in given and "SLURM_JOB_ID" not in given:
            raise UsageError(
                "SLURM_JOB_ID: nothing says at which port the tasks of the Slurm step meet; start "
                "them with srun, or set MASTER_PORT to a free one"
            )
        # Jobs that share a host, and steps of one job, need different ports.
        ids = read_number(given, "SLURM_JOB_ID") * 31 + read_number(given, "SLURM_STEP_ID")
        port = read_number(given, "MASTER_PORT", _FIRST_PORT + ids % _PORTS)
        return f"tcp://{host or first_host(nodes or '')}:{port}"

    @override
    def note_without(self, given: Mapping[str, str]) -> str | None:
        name, tasks = _tasks(given)
        if tasks == 1 or _is_in_step(given):
            return None
        return (
            f"one rank: the Slurm job has {tasks} tasks ({name}), and srun did not start this "
            "process; put srun in front to train on all of them"
        )


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list, such as ``gpu[01-03,07],login1``."""
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _is_in_step(given: Mapping[str, str]) -> bool:
    """Whether the process belongs to a step, which srun creates, not only to a job."""
    return any(name in given for name in _OF_STEP)


def _tasks(given: Mapping[str, str]) -> tuple[str, int]:
    """Return the variable that holds the number of tasks, and the number."""
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if name in given:
            return name, read_number(given, name)
    return "SLURM_NTASKS", 1
