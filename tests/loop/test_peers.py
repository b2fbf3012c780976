"""A run that fails on one rank ends on all of them, under every launcher.

The ranks of `run_ranks` wait for each other before they exit, so a failed rank stays. It keeps its
exception, and with it the connections that the others wait on: only the watch ends the others.
"""

import io
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import pytest
import torch
import torch.distributed as dist

from bridge.training.config import ConfigContainer, ConfigError
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.pretrain import pretrain
from bridge.training.ranks import failure_watch
from ranks import RankFailure, run_ranks
from training_runs import OwnData, OwnModel, OwnModule, Samples, own_run, rows, token_step

NOTICE = 0.5
FOREVER = 600.0
_kept: list[BaseException] = []


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_watch, "SECONDS_TO_NOTICE", NOTICE)
    monkeypatch.setattr(failure_watch, "SECONDS_TO_READ", 10.0)  # On a busy machine.


def rank() -> int:
    return int(os.environ["RANK"])


class Trouble:
    """A callback that fails in one event on one rank, or never returns from it."""

    def __init__(self, event: str, act: Callable[[], None], *, on_rank: int = 1) -> None:
        self.event, self.act, self.on_rank = event, act, on_rank

    def _hear(self, event: str, context: Any) -> None:
        step = context.state.train_state.step
        if (event, rank()) == (self.event, self.on_rank) and (step >= 2 or event == "start"):
            self.act()

    def on_train_start(self, context: Any) -> None:
        self._hear("start", context)

    def on_step_end(self, context: Any, result: Any) -> None:
        self._hear("step", context)

    def on_checkpoint_save(self, context: Any, path: Path) -> None:
        self._hear("save", context)

    def on_train_end(self, context: Any) -> None:
        self._hear("end", context)


def fail() -> None:
    raise ValueError("a shape\ndoes not fit")


def fails_with(error: type[BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


class PoorSamples(Samples):
    """Samples some of which cannot be read on rank 1."""

    def __init__(self, size: int, first: int, ends: bool) -> None:
        super().__init__(size, first)
        self.ends, self.reads = ends, 0

    @override
    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        self.reads += 1
        if rank() == 1 and self.reads > 6:
            if self.ends:
                raise StopIteration
            fail()
        return super().__getitem__(index)


@dataclass(kw_only=True)
class PoorData(OwnData):
    ends: bool = False

    @override
    def build(self, request: DataRequest) -> DataSplits:
        splits = super().build(request)
        if self.validation:
            splits.validation = PoorSamples(self.validation, 1000, self.ends)
        else:
            splits.train = PoorSamples(self.train, 0, self.ends)
        return splits


@dataclass(kw_only=True)
class DataOfOneRank(OwnData):
    of: int = 0

    @override
    def build(self, request: DataRequest) -> DataSplits:
        if rank() != self.of:
            fail()
        return super().build(request)


class UnsavableModule(OwnModule):
    broken = False

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.broken:
            fail()
        return super().state_dict(*args, **kwargs)


@dataclass(kw_only=True)
class UnsavableModel(OwnModel):
    @override
    def build(self, *arguments: Any, **named: Any) -> torch.nn.Module:
        return UnsavableModule(self.width, self.dropout)


def survived(config: ConfigContainer, *callbacks: object, **settings: Any) -> str:
    """Run like a program that catches the exception of the run and continues."""
    try:
        pretrain(config, token_step, callbacks, **settings)
        outcome = "finished"
    except BaseException as error:
        _kept.append(error)
        outcome = type(error).__name__
    assert [thread.name for thread in threading.enumerate() if thread.name == "peers"] == []
    return outcome


def ends_the_others(
    body: Callable[[], Any], capfd: pytest.CaptureFixture[str], **settings: Any
) -> list[str]:
    """Run on two ranks of which the run ends rank 0; return the lines that they printed."""
    with pytest.raises(RankFailure, match="^rank 0 died without a report$"):
        run_ranks(2, body, timeout=40, **settings)
    printed: list[str] = capfd.readouterr().err.splitlines()
    sys.stderr.write("\n".join(printed))
    return [line for line in printed if line.startswith(("rank 0", "rank 1"))]


@pytest.mark.parametrize(
    ("where", "phase", "what"),
    [
        ("start", "set-up", "ValueError: a shape does not fit"),
        ("callback", "step 2", "ValueError: a shape does not fit"),
        ("data", "step 2", "ValueError: a shape does not fit"),
        ("end of data", "step 2", "StopIteration"),
        ("validation", "validation at step 1", "ValueError: a shape does not fit"),
        ("state_dict", "checkpoint at step 2", "ValueError: a shape does not fit"),
        ("saved", "checkpoint at step 2", "ValueError: a shape does not fit"),
        ("build", "set-up", "ValueError: a shape does not fit"),
        ("exit", "step 2", "SystemExit"),
    ],
)
def test_a_rank_that_waits_for_a_failed_one_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], where: str, phase: str, what: str
) -> None:
    def body() -> str:
        config = own_run(tmp_path / "run")
        config.checkpoint.save_interval = 2
        config.validation.eval_interval = 1
        callbacks = []
        match where:
            case "start" | "callback" | "saved":
                event = {"callback": "step", "saved": "save"}.get(where, where)
                callbacks = [Trouble(event, fail)]
            case "exit":
                callbacks = [Trouble("step", fails_with(SystemExit))]
            case "data":
                config.dataset = PoorData()
            case "end of data":
                config.dataset = PoorData(ends=True)
            case "validation":
                config.dataset = PoorData(validation=16)
            case "state_dict":
                config.model = UnsavableModel()
                callbacks = [Trouble("step", lambda: setattr(UnsavableModule, "broken", True))]
            case "build":
                config.dataset = DataOfOneRank()
        return survived(config, *callbacks)

    report, ended = ends_the_others(body, capfd)
    assert report == f"rank 1, in {phase}: {what}"
    assert ended.startswith("rank 0, in ")
    assert ended.endswith(f": ends, since rank 1 failed in {phase}: {what}")


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("when", ["early", "set-up", "step"])
def test_ranks_that_meet_by_themselves_end_together_whoever_keeps_the_store(
    tmp_path: Path, when: str, failing: int
) -> None:
    def body() -> str:
        config = own_run(tmp_path / "run")
        callbacks = []
        if when == "early" and rank() == failing:
            config.dist.device = "cuda"
        if when == "set-up":
            config.dataset = DataOfOneRank(of=1 - failing)
        if when == "step":
            callbacks = [Trouble("step", fail, on_rank=failing)]
        return survived(config, *callbacks)

    began = time.monotonic()
    message = f"^rank {1 - failing} died without a report$"
    with pytest.raises(RankFailure, match=message):
        run_ranks(2, body, timeout=40, process_group=False)
    assert time.monotonic() - began < 30


def test_a_rank_that_waits_for_another_in_the_last_callback_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> str:
        def wait() -> None:
            dist.barrier()

        callbacks = [Trouble("end", wait, on_rank=0), Trouble("end", fail)]
        return survived(own_run(tmp_path / "run"), *callbacks)

    report, ended = ends_the_others(body, capfd)
    assert report == "rank 1, in final evaluation: ValueError: a shape does not fit"
    assert "rank 0, in final evaluation: ends, since rank 1 failed" in ended


def test_a_second_ctrl_c_ends_all_ranks_without_a_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> str:
        callback = Trouble("step", fails_with(KeyboardInterrupt))
        return survived(own_run(tmp_path / "run"), callback)

    (ended,) = ends_the_others(body, capfd)
    assert ended.endswith(": ends, since rank 1 failed in step 2: KeyboardInterrupt")


def test_a_rank_that_has_failed_and_does_not_come_to_its_end_ends_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_watch, "SECONDS_TO_LEAVE", NOTICE)

    def body() -> str:
        callbacks = [
            Trouble("step", fail, on_rank=0),
            Trouble("end", lambda: time.sleep(FOREVER), on_rank=0),
        ]
        with suppress(RuntimeError):
            return survived(own_run(tmp_path / "run"), *callbacks)
        return "lost its peer"

    with pytest.raises(RankFailure, match="died without a report"):
        run_ranks(2, body, timeout=40)
    lines = capfd.readouterr().err.splitlines()
    assert "rank 0, in step 2: ValueError: a shape does not fit" in lines
    assert any(line.startswith("rank 0, in step 2: ends, since it has not left") for line in lines)


@pytest.mark.parametrize("process_group", [True, False])
def test_an_error_of_all_ranks_is_an_exception_on_each_and_the_next_run_trains(
    tmp_path: Path, process_group: bool
) -> None:
    def body() -> Any:
        mistaken = own_run(tmp_path / "mistaken")
        mistaken.train.global_batch_size = 7
        torn = own_run(tmp_path / "torn", dataset=DataOfOneRank(of=-1))
        callback = own_run(tmp_path / "callback")
        began = time.monotonic()
        outcomes = [
            survived(mistaken),
            survived(torn),
            survived(callback, Trouble("step", fail), Trouble("step", fail, on_rank=0)),
        ]
        seconds = time.monotonic() - began
        # A watch that outlived those runs would end this process.
        time.sleep(3 * NOTICE)
        config = own_run(tmp_path / "good")
        return outcomes, survived(config), seconds

    for outcomes, last, seconds in run_ranks(2, body, timeout=60, process_group=process_group):
        assert outcomes == [ConfigError.__name__, "ValueError", "ValueError"]
        assert last == "finished"
        assert seconds < 30
    assert [row["step"] for row in rows(tmp_path / "good")] == [1, 2, 3, 4, 5]


def test_a_rank_that_waits_too_long_for_another_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_watch, "SECONDS_TO_NOTICE", 30.0)
    reports: list[str] = []

    def step(state: Any, data_iterator: Iterator[Any], model: Any) -> Any:
        if state.train_state.step == 2 and rank() == 1:
            time.sleep(3)
        return token_step(data_iterator, model)

    def body() -> tuple[float, list[str], list[str]]:
        config = own_run(tmp_path / "run")
        config.dist.timeout_minutes = 0.03
        began = time.monotonic()
        try:
            pretrain(config, step, on_failure=lambda error, line: reports.append(line))
        except RuntimeError as error:
            _kept.append(error)
            return time.monotonic() - began, error.__notes__, reports
        raise AssertionError("no rank waited too long")

    seconds, notes, lines = run_ranks(2, body)[0]
    assert 1.8 < seconds < 30
    named = "dist.timeout_minutes=0.03: a collective waits no longer for the other ranks"
    assert named in notes[0]
    assert named in lines[0]


def test_an_exception_that_follows_from_another_ranks_says_so(tmp_path: Path) -> None:
    def body() -> list[str]:
        if rank() == 1:
            survived(own_run(tmp_path / "run"), Trouble("step", fail))
            return _kept[-1].__notes__

        def late() -> None:
            time.sleep(0.3 * NOTICE)
            raise RuntimeError("the connection is lost")

        with pytest.raises(RuntimeError) as caught:
            pretrain(own_run(tmp_path / "run"), token_step, [Trouble("step", late, on_rank=0)])
        return caught.value.__notes__

    follower, first = run_ranks(2, body, timeout=40)
    assert first == ["in callback Trouble.on_step_end", "rank 1, in step 2"]
    assert follower == [
        "in callback Trouble.on_step_end",
        "after rank 1 failed in step 2: ValueError: a shape does not fit",
        "rank 0, in step 2",
    ]


def test_a_caller_can_get_the_report_instead_of_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> Any:
        reports: list[tuple[str, str]] = []

        def tell(error: BaseException, line: str) -> None:
            reports.append((type(error).__name__, line))

        callbacks = [Trouble("step", fail, on_rank=rank())]
        survived(own_run(tmp_path / str(dist.get_world_size())), *callbacks, on_failure=tell)
        return reports

    for world_size in (1, 2):
        for number, reports in enumerate(run_ranks(world_size, body, timeout=40)):
            assert reports == [
                ("ValueError", f"rank {number}, in step 2: ValueError: a shape does not fit")
            ]
    assert "a shape does not fit" not in capfd.readouterr().err


def test_the_live_line_ends_before_a_failure_is_reported(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        @override
        def isatty(self) -> bool:
            return True

    def body() -> str:
        os.environ.pop("TERM", None)
        sys.stdout = terminal = Terminal()
        failing = Trouble("step", fail, on_rank=0)

        def tell(error: BaseException, line: str) -> None:
            terminal.write(line)

        survived(own_run(tmp_path / "run"), failing, on_failure=tell)
        return terminal.getvalue()

    (written,) = run_ranks(1, body, timeout=40)
    assert "\rstep 1/5" in written
    assert "\nrank 0, in step 2: ValueError" in written


def test_one_rank_alone_raises_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> str:
        return survived(own_run(tmp_path / "run"), Trouble("step", fail, on_rank=0))

    assert run_ranks(1, body, timeout=40) == ["ValueError"]
    assert "a shape does not fit" not in capfd.readouterr().err


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    def body() -> Any:
        config = own_run(tmp_path / "run")
        config.checkpoint.save_at_end = True
        callback = Trouble("step", lambda: os.kill(os.getpid(), signal.SIGINT))
        result = pretrain(config, token_step, [callback])
        return result.reason, result.step

    assert run_ranks(2, body, timeout=40) == [("SIGINT", 2)] * 2
    assert (tmp_path / "run" / "checkpoints" / "step-0000002").is_dir()


@pytest.fixture
def started_alone(tmp_path: Path) -> Iterator[Callable[..., list[int | None]]]:
    """Start ranks like a scheduler that watches none of them; return their exit codes."""
    fork = multiprocessing.get_context("fork")
    processes: list[Any] = []

    def be(number: int, port: int, body: Callable[[], Any]) -> None:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        body()

    def start(body: Callable[[], Any]) -> list[int | None]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes.extend(fork.Process(target=be, args=(number, port, body)) for number in range(2))
        for process in processes:
            process.start()
        deadline = time.monotonic() + 40
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("failing", [0, 1])
def test_no_rank_is_left_where_nobody_ends_them(
    tmp_path: Path,
    started_alone: Callable[..., list[int | None]],
    capfd: pytest.CaptureFixture[str],
    failing: int,
) -> None:
    def body() -> None:
        callbacks = [
            Trouble("step", fail, on_rank=failing),
            # The store ends with rank 0, as soon as it can after the failure.
            Trouble("end", lambda: os._exit(1), on_rank=failing),
            Trouble("step", lambda: time.sleep(FOREVER), on_rank=1 - failing),
        ]
        pretrain(own_run(tmp_path / "run"), token_step, callbacks)

    assert started_alone(body) == [1, 1]
    why = f"since rank {failing} failed in step 2: ValueError: a shape does not fit"
    assert f"rank {1 - failing}, in step 2: ends, {why}" in capfd.readouterr().err


def test_ranks_that_a_launcher_starts_again_hear_nothing_of_what_failed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def body(start: int) -> str:
        os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": str(start)}
        config = own_run(tmp_path / str(start))
        failing = [Trouble("step", fail, on_rank=rank())]
        return survived(config, *(failing if start == 0 else []))

    assert run_ranks(2, body, 0, process_group=False, timeout=40) == ["ValueError"] * 2
    assert run_ranks(2, body, 1, process_group=False, timeout=40) == ["finished"] * 2


def test_the_process_that_keeps_the_store_is_missed(
    tmp_path: Path,
    started_alone: Callable[..., list[int | None]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    def body() -> None:
        callbacks = [
            Trouble("step", lambda: os.kill(os.getpid(), signal.SIGKILL), on_rank=0),
            # As with NCCL, which does not notice that a peer has gone.
            Trouble("step", lambda: time.sleep(FOREVER)),
        ]
        pretrain(own_run(tmp_path / "run"), token_step, callbacks)

    assert started_alone(body) == [-signal.SIGKILL, 1]
    assert "rank 1, in step 2: ends, since the process has ended that kept the store" in (
        capfd.readouterr().err
    )


def test_a_rank_that_ends_before_the_others_is_not_taken_for_a_failure(
    tmp_path: Path, started_alone: Callable[..., list[int | None]]
) -> None:
    def body() -> None:
        def write() -> None:
            time.sleep(4 * NOTICE + 1)
            (tmp_path / "written").touch()

        pretrain(own_run(tmp_path / "run"), token_step, [Trouble("end", write)])

    assert started_alone(body) == [0, 0]
    assert (tmp_path / "written").exists()
