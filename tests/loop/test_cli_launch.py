import json
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import own_recipe
from bridge.cli.runs import launch
from commands import Command, Ended, run, start

SLOW = ("dataset.seconds_per_sample=0.05", "train.train_iters=400", "checkpoint.save_interval=null")

TWELVE_STEPS = ("train.train_iters=12", "checkpoint.save_interval=null")
RUN = "the run"
"""The run's directory, with a blank that a shell must have quoted."""


@pytest.fixture(autouse=True)
def _folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    site.mkdir()
    own_recipe.install(site, monkeypatch)
    # Short: the names of sockets in it have 107 bytes at most.
    with tempfile.TemporaryDirectory() as temporary:
        monkeypatch.setattr("tempfile.tempdir", temporary)
        yield
        assert os.listdir(temporary) == []


def test_the_rank_that_fails_is_named_with_its_step_and_the_others_end_too(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = run("pretrain", "failing", "--run-dir", RUN, "--nproc", "2", folder=tmp_path)
    assert ended.code == 1
    assert time.monotonic() - began < 30
    assert "RuntimeError: a shape does not fit\nrank 1, in step 3" in ended.err
    last = ended.err.splitlines()[-1]
    assert last == (
        "bridge: the first failure was rank 1, in step 3: RuntimeError: a shape does not fit"
    )


def test_a_value_error_of_a_running_step_is_a_failure_with_a_traceback(tmp_path: Path) -> None:
    ended = run("pretrain", "mistaken", "--run-dir", RUN, "--nproc", "2", folder=tmp_path)
    assert ended.code == 1
    assert "own_recipe.py" in ended.err
    assert "in step 3: ValueError: a shape does not fit" in ended.err.splitlines()[-1]


def test_a_killed_rank_is_named_though_it_leaves_no_report(tmp_path: Path) -> None:
    arguments = ("pretrain", "killed", "--run-dir", RUN, "--nproc", "2")
    ended = run(*arguments, folder=tmp_path, timeout=30)
    assert ended.code == 128 + signal.SIGKILL
    assert ended.err.splitlines()[-1] == "bridge: rank 1 was killed by SIGKILL"


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_mistake_that_only_the_data_show_is_reported_once_and_leaves_nothing(
    tmp_path: Path, ranks: str
) -> None:
    arguments = ("dataset.size=13", "--run-dir", RUN, "--nproc", ranks)
    ended = run("pretrain", "sine", *arguments, folder=tmp_path)
    assert ended.code == 2
    assert ended.err == "bridge: dataset.size=13: only found when the data is built; take another\n"
    assert not (tmp_path / RUN).exists()


def test_a_mistake_that_only_another_rank_finds_is_reported(tmp_path: Path) -> None:
    arguments = ("dataset.size=14", "--run-dir", RUN, "--nproc", "2")
    ended = run("pretrain", "sine", *arguments, folder=tmp_path)
    assert ended.code == 2
    assert ended.err == "bridge: dataset.size=14: only rank 1 minds\n"
    assert not (tmp_path / RUN).exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of an uninterrupted run, by the number of its ranks."""
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        own_recipe.install(tmp_path_factory.mktemp("site"), monkeypatch)
        for ranks in ("1", "2"):
            folder = tmp_path_factory.mktemp("undisturbed")
            ended = run(
                "pretrain", "sine", *TWELVE_STEPS, "--run-dir", RUN, "--nproc", ranks, folder=folder
            )
            assert ended.code == 0, ended.err
            found[ranks] = _rows(folder)
    return found


@pytest.mark.parametrize(
    ("ranks", "number", "to", "workers"),
    [
        ("1", signal.SIGINT, "group", 2),
        ("1", signal.SIGTERM, "group", 2),
        ("2", signal.SIGINT, "group", 0),
        ("2", signal.SIGTERM, "all", 2),
        ("2", signal.SIGHUP, "process", 0),
    ],
)
def test_a_signal_lets_the_step_end_and_save_and_the_run_continues_bit_for_bit(
    tmp_path: Path,
    undisturbed: dict[str, list[dict[str, Any]]],
    ranks: str,
    number: signal.Signals,
    to: str,
    workers: int,
) -> None:
    settings = (*TWELVE_STEPS, "dataset.seconds_per_sample=0.05", f"train.num_workers={workers}")
    command = _started(tmp_path, *settings, ranks=ranks, lines=2)
    processes = command.descendants()
    assert len(processes) >= int(ranks) * workers
    command.send(number, to_group=to == "group")
    for process in processes if to == "all" else ():  # As a scheduler does.
        os.kill(process, number)
    time.sleep(0.2)
    if number == signal.SIGINT and command.is_running():
        command.send(number)  # `uv run` passes on a signal that the group has received already.
    ended = command.wait()
    assert (ended.code, ended.err) == (128 + number, "")
    step = len(_steps(tmp_path))
    assert step < 12
    assert f"stopped by {number.name} at step {step}/12" in ended.out
    assert _latest(tmp_path) == f"step-{step:07d}"
    assert not any(psutil.pid_exists(pid) for pid in processes)

    resume_line = next(line for line in ended.out.splitlines() if line.startswith("resume "))
    program, *arguments = shlex.split(resume_line.removeprefix("resume "))
    assert program == "bridge"
    resumed = run(*arguments, folder=tmp_path)
    assert resumed.code == 0
    assert f"{ranks} rank" in resumed.out
    assert f"continues after step {step}" in resumed.out
    assert _rows(tmp_path) == undisturbed[ranks]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_run_whose_output_nobody_reads_still_saves(tmp_path: Path, ranks: str) -> None:
    # As in `bridge ... | tee log`: a Ctrl-C ends `tee` too.
    reader, writer = os.pipe()
    os.close(reader)
    command = _started(tmp_path, *SLOW, ranks=ranks, lines=2, output=writer)
    os.close(writer)
    command.send(signal.SIGINT)
    ended = command.wait()
    assert (ended.code, ended.err) == (128 + signal.SIGINT, "")
    assert _latest(tmp_path) == f"step-{_steps(tmp_path)[-1]:07d}"


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_second_interrupt_ends_at_once(tmp_path: Path, ranks: str) -> None:
    # A step lasts for a minute.
    command = _started(
        tmp_path, "dataset.seconds_per_sample=15", "train.num_workers=2", ranks=ranks
    )
    time.sleep(0.3)
    processes = command.descendants()
    began = time.monotonic()
    for _ in range(2):
        command.send(signal.SIGINT)
        time.sleep(0.8)
    ended = command.wait()
    assert ended.code == 128 + signal.SIGINT
    assert time.monotonic() - began < 10
    assert not any(psutil.pid_exists(pid) for pid in processes)


def test_no_interrupt_is_lost_while_the_ranks_start(tmp_path: Path) -> None:
    for number, delay in enumerate((0.1, 0.25, 0.35, 0.45, 0.6)):
        folder = tmp_path / str(number)
        command = start("pretrain", "sine", *SLOW, "--run-dir", RUN, "--nproc", "2", folder=folder)
        time.sleep(delay)
        command.send(signal.SIGINT)
        assert command.wait(20).code == 128 + signal.SIGINT
        assert "Traceback" not in command.err


def test_ranks_do_not_outlive_a_launcher_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A killed process cannot clean up.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = _started(tmp_path, *SLOW, ranks="2", lines=2)
    ranks = command.descendants()
    assert len(ranks) == 2
    command.send(signal.SIGKILL)
    command.wait()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["torchrun", "Slurm"])
def test_under_a_launcher_the_command_is_one_rank(
    tmp_path: Path, undisturbed: dict[str, list[dict[str, Any]]], launcher: str
) -> None:
    commands = [
        start(
            "pretrain", "sine", *TWELVE_STEPS, "--run-dir", f"../{RUN}",
            folder=tmp_path / str(rank),
            environment=_variables_of(launcher, str(rank)),
        )
        for rank in range(2)
    ]  # fmt: skip
    ended: list[Ended] = [command.wait() for command in commands]
    assert [end.code for end in ended] == [0, 0], ended
    assert "2 ranks (data 2)" in ended[0].out
    assert ended[1].out == ""
    assert _rows(tmp_path) == undisturbed["2"]


def _variables_of(launcher: str, rank: str) -> dict[str, str]:
    if launcher == "Slurm":
        return {
            "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "localhost",
        }  # fmt: skip
    return {
        "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(),
    }  # fmt: skip


def test_ranks_can_be_processes_of_their_own_as_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_ranks = launch._launch

    def launch_as_on_gpus(*arguments: Any) -> int:
        monkeypatch.setattr("bridge.training.ranks.groups.choose_device", lambda wanted: "cuda")
        return launch_ranks(*arguments)

    monkeypatch.setattr(launch, "_launch", launch_as_on_gpus)
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(own_recipe.__file__).parent)])
    command = _started(tmp_path, *SLOW, ranks="2", lines=2, environment={"PYTHONPATH": path})
    processes = command.descendants()
    command.send(signal.SIGINT, to_group=True)
    ended = command.wait()
    assert (ended.code, ended.err) == (128 + signal.SIGINT, "")
    assert "stopped by SIGINT" in ended.out
    assert not any(psutil.pid_exists(pid) for pid in processes)


def _started(folder: Path, *arguments: str, ranks: str, lines: int = 0, **settings: Any) -> Command:
    """Start a run and wait until it has logged `steps` steps, or has begun the first."""
    command = start(
        "pretrain", "sine", *arguments, "--run-dir", RUN, "--nproc", ranks,
        folder=folder, **settings,
    )  # fmt: skip
    if lines:
        command.wait_for(folder / RUN / "metrics.jsonl", lines)
    else:
        command.wait_for(folder / "stdout", 11)
    return command


def _steps(folder: Path) -> list[int]:
    lines = (folder / RUN / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Return the logged values of each step, without times."""
    lines = (folder / RUN / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in row.items() if not key.endswith(("_s", "_per_s"))}
        for row in rows
    ]


def _latest(folder: Path) -> str:
    return (folder / RUN / "checkpoints" / "latest").read_text().strip()


def _free_port() -> str:
    """Return a port of this worker's own, the same for all ranks of the test."""
    return str(21000 + os.getpid() % 20000)
