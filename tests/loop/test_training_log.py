import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge.training import cpu
from bridge.training.config import CheckpointConfig, LoggerConfig
from bridge.training.reporting.progress import Progress
from bridge.training.reporting.training_log import _TIMERS, TrainingLog
from bridge.training.state import GlobalState
from bridge.training.train import StepResult
from ranks import run_ranks


class Log:
    """A training log on rank 0, and its output."""

    def __init__(self, run_dir: Path, **settings: Any) -> None:
        level = settings.pop("timing_log_level", 0)
        cfg: Any = SimpleNamespace(
            logger=LoggerConfig(tensorboard=False, timing_log_level=level),
            checkpoint=CheckpointConfig(run_dir=str(run_dir)),
            model=SimpleNamespace(seq_length=64),
        )
        self.stream = io.StringIO()
        self.path = run_dir / "metrics.jsonl"
        self.state = GlobalState(cfg)
        self.state.open_loggers(0)
        self.log = TrainingLog(
            state=self.state,
            progress=Progress(self.stream),
            total_steps=100,
            device="cpu",
            world_size=1,
            **settings,
        )

    def step(self, **changes: Any) -> None:
        values: dict[str, Any] = {
            "learning_rate": 1e-3,
            "grad_norm": torch.tensor(1.5),
            "skipped": False,
            "samples": 8,
            "padded_tokens": 512,
            "reduced": None,
        }
        counters = self.state.train_state
        counters.step += 1
        counters.consumed_train_samples += 8
        self.state.token_counter.add_step(8, has_metrics=False)
        self.log.add_step(StepResult(**(values | changes)))

    def write(self, metrics: dict[str, float | None], **arguments: Any) -> dict[str, float | None]:
        counts = self.state.token_counter.take_interval()
        return self.log.write(metrics, counts, **arguments)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


type OpenLog = Callable[..., Log]


@pytest.fixture
def open_log(tmp_path: Path) -> Iterator[OpenLog]:
    with contextlib.ExitStack() as stack:

        def open_one(**settings: Any) -> Log:
            log = Log(tmp_path, **settings)
            stack.callback(log.state.close)
            return log

        yield open_one


def test_a_row_has_the_documented_names_in_their_order(open_log: OpenLog) -> None:
    log = open_log()
    log.step()
    log.step()
    row = log.write({"lm loss": 2.5, "accuracy": None})
    assert list(row) == [
        "step",
        "consumed_samples",
        "consumed_tokens",
        "lm loss",
        "accuracy",
        "learning_rate",
        "grad_norm",
        "skipped_steps",
        "step_time_s",
        "tokens_per_s",
        "samples_per_s",
    ]
    assert log.rows == [row]
    assert (row["step"], row["consumed_samples"], row["consumed_tokens"]) == (2, 16, 1024)
    assert (row["grad_norm"], row["accuracy"]) == (1.5, None)
    assert log.stream.getvalue().startswith("step 2/100 | lm loss 2.5000")


def test_rates_are_means_over_the_steps_since_the_row_before(open_log: OpenLog) -> None:
    log = open_log()
    for steps in (1, 4):
        begin = time.perf_counter()
        for _ in range(steps):
            log.step()
        time.sleep(0.1)
        row = log.write({})
        most = time.perf_counter() - begin
        seconds = row["step_time_s"]
        assert seconds is not None
        assert 0.1 <= seconds * steps <= most + 0.05
        assert row["tokens_per_s"] == pytest.approx(512 / seconds)
        assert row["samples_per_s"] == pytest.approx(8 / seconds)


def test_what_else_the_data_counts_has_a_rate(open_log: OpenLog) -> None:
    log = open_log()
    log.step()
    log.step()
    row = log.log.write({}, {"tokens": 700, "images": 3})
    seconds = 2 * (row["step_time_s"] or 0.0)
    assert row["tokens_per_s"] == pytest.approx(700 / seconds)
    assert row["images_per_s"] == pytest.approx(3 / seconds)


def test_a_pause_is_not_in_the_steps_time(open_log: OpenLog) -> None:
    log = open_log()
    log.step()
    with log.log.pause():
        time.sleep(0.5)
    with contextlib.suppress(KeyError), log.log.pause():
        time.sleep(0.5)
        raise KeyError
    row = log.write({})
    assert row["step_time_s"] is not None
    assert row["step_time_s"] < 0.5


def test_skipped_steps_are_counted_since_the_row_before(open_log: OpenLog) -> None:
    log = open_log()
    log.step(skipped=True, grad_norm=None)
    log.step()
    log.step(skipped=True, grad_norm=None)
    first = log.write({})
    log.step()
    second = log.write({})
    assert (first["skipped_steps"], first["grad_norm"]) == (2, None)
    assert (second["skipped_steps"], second["grad_norm"]) == (0, 1.5)
    assert "2 skipped" in log.stream.getvalue()


def test_the_loss_scale_is_reported_where_there_is_one(open_log: OpenLog) -> None:
    log = open_log(loss_scale=lambda: 65536.0)
    log.step()
    assert log.write({})["loss_scale"] == 65536.0


def test_what_a_callback_adds_is_written_and_shown(open_log: OpenLog) -> None:
    log = open_log()
    log.step()
    log.write({"lm loss": 2.0}, on_record=lambda record: record.update(perplexity=7.389))
    assert log.rows[0]["perplexity"] == 7.389
    assert "perplexity 7.3890" in log.stream.getvalue()


@pytest.mark.parametrize("name", ["step", "learning_rate", "consumed_samples", "tokens_per_s"])
def test_a_metric_cannot_take_the_name_of_one_of_the_loops_values(
    name: str, open_log: OpenLog
) -> None:
    log = open_log()
    log.step()
    with pytest.raises(ValueError, match=f"metric '{name}' has the name"):
        log.write({"lm loss": 1.0, name: 1.0})


def test_an_evaluation_is_a_row_of_its_own_under_its_name(open_log: OpenLog) -> None:
    log = open_log()
    log.step()
    log.write({"lm loss": 2.0})
    log.log.write_evaluation("validation", {"lm loss": 1.5}, samples=64)
    assert log.rows[1:] == [{"step": 1, "validation/lm loss": 1.5}]
    assert "validation at step 1 | lm loss 1.5000 | samples 64" in log.stream.getvalue()


def test_there_is_no_row_without_a_step(open_log: OpenLog) -> None:
    with pytest.raises(RuntimeError, match="call add_step first"):
        open_log().write({})


def time_two_steps(run_dir: Path) -> dict[str, float | None]:
    rank = torch.distributed.get_rank()
    with cpu.cpu_training():
        log = Log(run_dir, timing_log_level=1)
        for _ in range(2):
            log.state.timers("forward-backward", log_level=1).start()
            time.sleep(0.05 * (1 + rank))
            log.state.timers("forward-backward").stop()
            if rank == 1:  # A timer that only one rank has, as pipeline stages do.
                log.state.timers("optimizer", log_level=1).start()
                log.state.timers("optimizer").stop()
            log.state.timers("forward-compute", log_level=2).start()
            log.step()
        row = log.write({})
        log.state.close()
        return row


def test_megatron_cores_timers_are_logged_as_the_slowest_ranks_seconds_a_step(
    tmp_path: Path,
) -> None:
    rows = run_ranks(2, time_two_steps, tmp_path)
    assert [row["forward-backward-time"] for row in rows] == pytest.approx([0.1, 0.1], rel=0.5)
    assert rows[0]["forward-backward-time"] == rows[1]["forward-backward-time"]
    assert "forward-compute-time" not in rows[0]


def test_every_timer_that_megatron_core_starts_is_known() -> None:
    import megatron.core

    package = Path(megatron.core.__file__).parent
    started = set()
    for source in package.rglob("*.py"):
        for quote in ("'", '"'):
            parts = source.read_text().split(f"timers({quote}")[1:]
            started |= {part.split(quote)[0] for part in parts}
    assert started
    assert started <= set(_TIMERS)
