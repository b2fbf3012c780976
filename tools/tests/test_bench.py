"""The benchmark against megatron.training (tools/bench) reads both sides in the same way."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))

from measured_run import Process, Window, read_ours, read_theirs, run_process, steady_step_s
from mock_tokens import RandomTokens

THEIR_LOG = """\
 [2026-11-21 07:53:01.2] iteration        1/      15 | consumed samples:            4 | elapsed \
time per iteration (ms): 2210.2 | throughput per GPU (TFLOP/s/GPU): 10.0 | learning rate: 1.5E-04 \
| global batch size:     4 | lm loss: 4.849525E+00 | loss scale: 1.0 | grad norm: 1.125 |
[Rank 0] (after 1 iterations) memory (MB) | allocated: 0.00 | max allocated: 0.00
 [2026-11-21 07:53:01.4] iteration        5/      15 | consumed samples:           20 | elapsed \
time per iteration (ms): 500.0 | throughput per GPU (TFLOP/s/GPU): 40.0 | learning rate: 2.4E-04 \
| global batch size:     4 | lm loss: 4.812721E+00 | loss scale: 1.0 | grad norm: 1.087 |
 [2026-11-21 07:53:01.6] iteration       10/      15 | consumed samples:           40 | elapsed \
time per iteration (ms): 100.0 | throughput per GPU (TFLOP/s/GPU): 200.0 | learning rate: 5.5E-05 \
| global batch size:     4 | lm loss: 4.670477E+00 | loss scale: 1.0 | grad norm: 1.084 |
rival {"event": "end", "peak_memory_gib": 12.5, "import_s": 3.5}
"""


def as_process(text: str) -> Process:
    """Pretend that one line came every second."""
    lines = [(float(second), line) for second, line in enumerate(text.splitlines(keepends=True), 9)]
    return Process(lines=lines, seconds=20.0, error=None, first_written_s=12.0)


def test_their_log_gives_windows_memory_loss_and_the_end_of_the_first_step() -> None:
    measured = read_theirs(as_process(THEIR_LOG))
    assert measured.windows == [Window(0, 5, 0.5), Window(5, 10, 0.1)]
    assert measured.first_step_s == 9.0
    assert measured.peak_memory_gib == 12.5
    assert measured.last_loss == pytest.approx(4.670477)
    assert measured.flops_per_step == pytest.approx(200e12 * 0.1)


def test_our_metrics_give_the_same_and_leave_evaluations_out(tmp_path: Path) -> None:
    rows = [
        {"step": 5, "lm loss": 4.8, "step_time_s": 0.5, "memory_gb": 10.0},
        {"step": 5, "validation/lm loss": 9.0},
        {"step": 10, "lm loss": 4.6, "step_time_s": 0.1, "memory_gb": 2**30 / 1e8},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = read_ours(as_process(""), path)
    assert measured.windows == [Window(0, 5, 0.5), Window(5, 10, 0.1)]
    assert measured.peak_memory_gib == pytest.approx(10.0)
    assert measured.last_loss == 4.6
    # The file's first line, of step 5, was seen at 12 s; four steps before it took 0.1 s each.
    assert measured.first_step_s == pytest.approx(12.0 - 4 * 0.1)


def test_only_windows_after_the_warm_up_count_and_each_by_its_steps() -> None:
    windows = [Window(0, 5, 9.0), Window(5, 15, 1.0), Window(15, 20, 4.0)]
    assert steady_step_s(windows, 5) == pytest.approx((10 * 1.0 + 5 * 4.0) / 15)
    assert steady_step_s(windows, 20) is None


def test_a_run_over_its_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    script = "import subprocess, sys; print('up', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    process = run_process(
        [sys.executable, "-c", script], dict(os.environ), log=tmp_path / "log", limit_s=1.0
    )
    assert time.monotonic() - start < 20
    assert process.error == "killed after the limit of 1 s"
    assert [line for _, line in process.lines] == ["up\n"]


@pytest.mark.filterwarnings(r"ignore:::megatron\.")
def test_both_sides_read_the_same_tokens() -> None:
    from bridge.gpt.data.pretraining.random_tokens import RandomTokens as OurTokens

    ours = OurTokens(samples=8, seq_length=16, vocab_size=1000, seed=(1234, 0))
    theirs = RandomTokens(samples=8, seq_length=16, vocab_size=1000, seed=1234)
    for index in range(8):
        for name, tensor in ours[index].items():
            assert torch.equal(tensor, theirs[index][name]), name
