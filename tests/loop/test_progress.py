import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import termios
import time
from collections.abc import Callable

import pytest

from bridge.training.reporting.progress import Progress

ROW: dict[str, float | None] = {
    "consumed_samples": 80,
    "consumed_tokens": 81920,
    "lm loss": 2.5,
    "accuracy": 0.25,
    "learning_rate": 1e-3,
    "grad_norm": 1.25,
    "skipped_steps": 1,
    "step_time_s": 2.0,
    "tokens_per_s": 45_200.0,
    "samples_per_s": 10.0,
    "mfu": 0.412,
    "memory_gb": 12.34,
}


def on_a_terminal(write: Callable[[Progress], None], columns: int = 200) -> str:
    """Return what `write` sends to a real pseudo-terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        with contextlib.closing(Progress(stream)) as progress:
            write(progress)
    output = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed.
        while piece := os.read(ours, 65536):
            output += piece
    os.close(ours)
    return output.decode().replace("\r\n", "\n")


def on_a_screen(output: str) -> list[str]:
    """Apply carriage returns and erasures as a terminal does."""
    lines = []
    for line in output.split("\n"):
        shown = ""
        for written in line.split("\r"):
            first, *erasing = written.split("\x1b[K")
            shown = first + ("".join(erasing) if erasing else shown[len(first) :])
        lines.append(shown)
    return lines


def in_a_pipe(write: Callable[[Progress], None]) -> list[str]:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, contextlib.closing(Progress(stream)) as progress:
        write(progress)
    with os.fdopen(reader) as result:
        return result.read().splitlines()


def test_a_logged_step_is_one_plain_line_in_a_pipe() -> None:
    assert in_a_pipe(lambda progress: progress.step(10, 100, ROW)) == [
        "step 10/100 | lm loss 2.5000 | accuracy 0.2500 | lr 1.00e-03 | grad norm 1.25 | "
        "45.2k tokens/s | mfu 41.2% | 12.3 GB | 1 skipped | eta 3m00s"
    ]


def test_steps_between_logged_ones_write_nothing_to_a_pipe() -> None:
    assert in_a_pipe(lambda progress: progress.tick(11, 100)) == []


def test_a_terminal_shows_one_line_that_is_overwritten() -> None:
    def write(progress: Progress) -> None:
        progress.step(10, 100, ROW)
        progress.step(20, 100, ROW | {"lm loss": 2.0})

    output = on_a_terminal(write)
    assert on_a_screen(output) == [
        "step 20/100 | lm loss 2.0000 | lr 1.00e-03 | grad norm 1.25 | 45.2k tokens/s | "
        "mfu 41.2% | 12.3 GB | 1 skipped | eta 2m40s",
        "",
    ]
    assert output.count("\n") == 1


def test_a_terminal_counts_the_steps_between_logged_ones() -> None:
    def write(progress: Progress) -> None:
        progress.step(10, 100, ROW)
        progress.tick(11, 100)  # Too soon to be worth a write.
        time.sleep(0.12)
        progress.tick(12, 100)

    output = on_a_terminal(write)
    assert on_a_screen(output)[0].startswith("step 12/100 | lm loss 2.5000")
    assert "step 11/" not in output


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_the_live_line_is_cut_to_the_terminal(columns: int) -> None:
    output = on_a_terminal(lambda progress: progress.step(10, 100, ROW), columns)
    assert len(on_a_screen(output)[0]) == columns - 1


def test_a_note_takes_the_place_of_the_live_line() -> None:
    def write(progress: Progress) -> None:
        progress.step(10, 100, ROW)
        progress.note("saved step-10")
        progress.tick(10, 100)

    assert on_a_screen(on_a_terminal(write)) == ["saved step-10", ""]


def test_a_phase_is_visible_when_it_begins_and_timed_when_it_ends() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    with progress.phase("model"):
        assert stream.getvalue() == "model ...\n"
    assert re.fullmatch(r"model \.\.\.\nmodel +0\.0 s\n", stream.getvalue())


def test_a_phase_is_one_line_on_a_terminal() -> None:
    def write(progress: Progress) -> None:
        with progress.phase("model"):
            progress.note("built")
        with progress.phase("optimizer"):
            pass

    screen = on_a_screen(on_a_terminal(write))
    assert screen[0] == "built"
    assert re.fullmatch(r"model +0\.0 s", screen[1])
    assert re.fullmatch(r"optimizer +0\.0 s", screen[2])


def test_a_phase_that_fails_says_so() -> None:
    def write(progress: Progress) -> None:
        with pytest.raises(OSError, match="no data"), progress.phase("data"):
            raise OSError("no data")

    assert in_a_pipe(write)[1].startswith("data             failed after 0.0 s")


def test_an_evaluation_is_a_line_that_stays() -> None:
    def write(progress: Progress) -> None:
        progress.step(10, 100, ROW)
        progress.evaluation("validation", 10, {"lm loss": 2.25, "empty": None, "samples": 64})

    line = "validation at step 10 | lm loss 2.2500 | empty none | samples 64"
    assert on_a_screen(on_a_terminal(write))[0] == line
    assert in_a_pipe(write)[1] == line


def test_the_summary_is_below_the_last_step() -> None:
    def write(progress: Progress) -> None:
        progress.step(100, 100, ROW)
        progress.summary(["finished", "run runs/x"])

    screen = on_a_screen(on_a_terminal(write))
    assert screen[0].startswith("step 100/100")
    assert "eta" not in screen[0]
    assert screen[1:] == ["", "finished", "run runs/x", ""]
    assert in_a_pipe(write)[1:] == ["", "finished", "run runs/x"]


def test_ranks_that_do_not_speak_write_nothing() -> None:
    stream = io.StringIO()
    progress = Progress(stream, enabled=False, is_terminal=True)
    with contextlib.closing(progress), progress.phase("model"):
        progress.step(10, 100, ROW)
        progress.tick(20, 100)
        progress.evaluation("validation", 10, {})
        progress.summary(["finished"])
    assert stream.getvalue() == ""


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in on_a_terminal(lambda progress: progress.step(10, 100, ROW))


def test_values_that_are_not_there_are_not_shown() -> None:
    row = {"lm loss": None, "learning_rate": 1e-3, "grad_norm": None, "tokens_per_s": 90.0}
    lines = in_a_pipe(lambda progress: progress.step(1, 2, row))
    assert lines == ["step 1/2 | lm loss none | lr 1.00e-03 | 90 tokens/s"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (75, "1m15s"), (3720, "1h02m"), (100_000, "1d03h")]
)
def test_the_time_that_is_left_reads_naturally(seconds: float, text: str) -> None:
    lines = in_a_pipe(lambda progress: progress.step(1, 2, {"step_time_s": seconds}))
    assert lines == [f"step 1/2 | eta {text}"]
