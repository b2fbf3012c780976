"""A directory has one run at a time: its process is named, and its end releases the directory."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import yaml

import own_recipe
from bridge.training.run_files import lock
from bridge.training.run_files.lock import directory_lock, rank_lock
from bridge.training.setup import training_parts
from bridge.training.usage_error import UsageError
from commands import Command, start
from commands import run as run_command
from ranks import run_ranks
from training_runs import own_run, token_step

SLOW = ("dataset.seconds_per_sample=0.02", "train.train_iters=400")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a package of recipes installed and no launcher around."""
    return own_recipe.work_folder(tmp_path, monkeypatch)


@contextlib.contextmanager
def held_elsewhere(hold: AbstractContextManager[None]) -> Iterator[int]:
    """Enter `hold` in another process, which the block may end; yield its process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with hold:
                os.write(writer, b"held")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 4) == b"held"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_directory_that_another_process_holds_is_rejected_until_that_is_killed(
    work: Path,
) -> None:
    place = work / "runs" / "R"
    with held_elsewhere(directory_lock(place)) as pid:
        holder = f"process {pid} on host {socket.gethostname()} "
        with pytest.raises(UsageError, match=f"checkpoint.run_dir='{place}': {holder}"):
            directory_lock(place).__enter__()
    # The file of the killed process is still there.
    assert (place / "run.lock").exists()
    with directory_lock(place):
        pass
    assert list(place.iterdir()) == []


def test_what_a_claim_has_made_goes_with_it_and_nothing_else_does(work: Path) -> None:
    with directory_lock(work / "runs" / "R"):
        assert [path.name for path in (work / "runs" / "R").iterdir()] == ["run.lock"]
    assert list(work.iterdir()) == []
    with directory_lock(work / "runs" / "R"):
        (work / "runs" / "R" / "config.yaml").touch()
    assert [path.name for path in (work / "runs" / "R").iterdir()] == ["config.yaml"]


def test_a_claim_is_taken_over_once_within_a_process(work: Path) -> None:
    with directory_lock(work / "R"):
        for _ in range(2):
            with directory_lock(work / "R"):
                with pytest.raises(UsageError, match=f"process {os.getpid()} on host"):
                    directory_lock(work / "R").__enter__()
                assert (work / "R" / "run.lock").exists()


def test_a_rank_that_outlives_the_holder_keeps_others_away(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SECONDS_FOR_RANKS_TO_END", 0.1)
    with (
        held_elsewhere(directory_lock(work / "R")) as holder,
        held_elsewhere(rank_lock(work / "R")),
    ):
        os.kill(holder, signal.SIGKILL)
        os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
        with pytest.raises(
            UsageError, match=f"ranks of the run of process {holder} on host .* not"
        ):
            directory_lock(work / "R").__enter__()
    with directory_lock(work / "R"):
        pass


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("file", "is a file"),
        ("link", "is a link to 'nowhere', which is not there"),
        ("file/R", "cannot be written (file/R: Not a directory)"),
        ("/proc/R", "cannot be written (/proc/R: No such file or directory)"),
    ],
)
def test_a_path_that_can_be_no_directory_is_rejected(work: Path, path: str, complaint: str) -> None:
    (work / "file").touch()
    (work / "link").symlink_to("nowhere")
    with pytest.raises(UsageError) as caught:
        directory_lock(Path(path)).__enter__()
    assert str(caught.value).startswith(f"checkpoint.run_dir: '{path}' {complaint}")


def test_of_two_starts_at_once_one_trains_and_the_other_names_it(work: Path) -> None:
    arguments = (
        "pretrain",
        "sine",
        "dataset.seconds_per_sample=0.05",
        "checkpoint.save_interval=null",
        "--run-dir",
        str(work / "R"),
    )
    commands = [
        start(*arguments, *more, folder=work / str(number))
        for number, more in enumerate(((), (), ("--nproc", "2")))
    ]
    ended = [command.wait() for command in commands]
    assert sorted(end.code for end in ended) == [0, 2, 2]
    winner = next(c for c, end in zip(commands, ended, strict=True) if end.code == 0)
    for end in ended:
        if end.code == 2:
            assert f"process {winner.pid} on host" in end.err
            assert end.out == ""
    assert yaml.safe_load((work / "R" / "config.yaml").read_text())["command"] == "pretrain"
    assert not (work / "R" / "run.lock").exists()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_run_is_not_resumed_while_it_trains_and_is_at_once_after_a_kill(
    work: Path, ranks: str
) -> None:
    running = start("pretrain", "sine", *SLOW, "--run-dir", "R", "--nproc", ranks, folder=work)
    running.wait_for(work / "R" / "checkpoints" / "latest", 1)
    resume = ("pretrain", "sine", "--run-dir", "../R", "--resume")
    for second in _as_two_ranks(resume, work) if ranks == "1" else [run_of(resume, work)]:
        ended = second.wait()
        assert ended.code == 2
        assert f"process {running.pid} on host {socket.gethostname()}" in ended.err
    assert running.is_running()
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    latest = (work / "R" / "checkpoints" / "latest").read_text()
    step = int(latest.removeprefix("step-"))
    ended = run_of((*resume, f"train.train_iters={step + 20}"), work).wait()
    assert ended.code == 0, ended.err
    assert "continues after step" in ended.out


def run_of(arguments: tuple[str, ...], work: Path) -> Command:
    return start(*arguments, folder=work / "second")


def _as_two_ranks(arguments: tuple[str, ...], work: Path) -> list[Command]:
    port = str(21000 + os.getpid() % 20000)
    addresses = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(*arguments, folder=work / str(rank), environment={"RANK": str(rank), **addresses})
        for rank in range(2)
    ]


def test_a_program_with_a_loop_of_its_own_saves_only_where_no_other_trains(work: Path) -> None:
    def body() -> None:
        with training_parts(own_run(work / "R"), token_step) as parts:
            with pytest.raises(UsageError, match=r"checkpoint.run_dir='.*R': process \d+ on host"):
                parts.checkpointer.save()
            os.kill(holder, signal.SIGKILL)
            while psutil.Process(holder).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
            parts.checkpointer.save()
            assert (work / "R" / "run.lock").exists()
        assert [path.name for path in (work / "R").iterdir()] == ["checkpoints"]

    with held_elsewhere(directory_lock(work / "R")) as holder:
        run_ranks(1, body)


@pytest.mark.parametrize(("made_by", "other"), [("pretrain", "finetune"), ("finetune", "pretrain")])
def test_a_run_is_continued_by_the_command_that_made_it(
    work: Path, made_by: str, other: str
) -> None:
    (work / "R").mkdir()
    (work / "R" / "config.yaml").write_text(f"command: {made_by}\n...\n")
    ended = run_command(other, "sine", "--run-dir", "R", "--resume", folder=work)
    assert ended.code == 2
    assert f"checkpoint.run_dir='R': it holds a run of {made_by}, and {other} would" in ended.err
