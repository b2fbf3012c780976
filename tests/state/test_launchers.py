"""A process knows its rank from torchrun or Slurm, and half of what they set is rejected."""

import re

import pytest

from bridge.training.launchers import rank_environment, rendezvous_url
from bridge.training.launchers.slurm import first_host
from bridge.training.usage_error import UsageError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
BATCH_SCRIPT = {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("variables", "launcher", "rank", "world_size", "local_rank"),
    [
        ({}, None, 0, 1, None),
        ({"RANK": "", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, None, 0, 1, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "torchrun", 0, 1, None),
        ({**TORCHRUN, "LOCAL_RANK": "3"}, "torchrun", 1, 4, 3),
        ({**TORCHRUN, **STEP}, "torchrun", 1, 4, None),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "Slurm", 1, 2, None),
        (STEP, "Slurm", 0, 2, 0),
        ({**BATCH_SCRIPT, **STEP, "SLURM_PROCID": "1"}, "Slurm", 1, 2, 0),
        # A batch script, a shell of salloc, and the same as a step of its own.
        (BATCH_SCRIPT, None, 0, 1, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None, 0, 1, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None, 0, 1, None),
    ],
)
def test_the_launcher_says_which_rank_this_is(
    variables: dict[str, str],
    launcher: str | None,
    rank: int,
    world_size: int,
    local_rank: int | None,
) -> None:
    found = rank_environment(variables)
    assert (found.launcher, found.rank, found.world_size) == (launcher, rank, world_size)
    assert found.local_rank == local_rank
    assert found.start_words == (("srun",) if launcher == "Slurm" else ())


def test_a_process_of_a_slurm_job_that_srun_did_not_start_says_so() -> None:
    note = rank_environment(BATCH_SCRIPT).note
    assert note is not None
    assert "the Slurm job has 8 tasks (SLURM_NTASKS), and srun did not start this" in note


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RANK": "0"}, "RANK=0: WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set too"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK, MASTER_ADDR and MASTER_PORT must be set too"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4: of WORLD_SIZE=4 ranks the last is 3"),
        ({**TORCHRUN, "RANK": "one"}, "RANK=one: expected a number"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "2"}, "SLURM_PROCID=2: of SLURM_NTASKS=2 ranks"),
        ({**STEP, "WORLD_SIZE": "4"}, "WORLD_SIZE=4: Slurm has started 2 tasks"),
    ],
)
def test_half_set_and_contradicting_variables_are_named(
    variables: dict[str, str], complaint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        rank_environment(variables)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node01", "node01"),
        ("node[01-03]", "node01"),
        ("node[7,9-11],login", "node7"),
        ("login,node[01-03]", "login"),
        ("rack[2-3]-gpu[05,08]-ib", "rack2-gpu05-ib"),
    ],
)
def test_the_tasks_of_slurm_meet_at_the_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_steps_meet_at_ports_of_their_own_unless_they_are_given() -> None:
    urls = {rendezvous_url({**STEP, "SLURM_STEP_ID": str(step)}) for step in range(3)}
    urls |= {rendezvous_url({**STEP, "SLURM_JOB_ID": "8"})}
    assert len(urls) == 4
    assert all(re.fullmatch(r"tcp://gpu03:[12]\d{4}", url) for url in urls)
    given = {**STEP, "MASTER_ADDR": "b", "MASTER_PORT": "5"}
    assert rendezvous_url(given) == "tcp://b:5"


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK=0: MASTER_PORT must be set"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_STEP_NODELIST: nothing says where"),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NODELIST": "a"},
            "SLURM_JOB_ID: nothing says at which port",
        ),
    ],
)
def test_ranks_that_cannot_meet_are_told_what_is_missing(
    variables: dict[str, str], complaint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        rendezvous_url(variables)
    assert complaint in str(caught.value)
