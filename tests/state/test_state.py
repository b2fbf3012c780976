import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge.training.config import CheckpointConfig, LoggerConfig
from bridge.training.state import GlobalState, TrainState


def state_for(run_dir: Path | None, **settings: Any) -> GlobalState:
    cfg = SimpleNamespace(
        logger=LoggerConfig(tensorboard=settings.pop("tensorboard", True)),
        checkpoint=CheckpointConfig(run_dir=None if run_dir is None else str(run_dir), **settings),
    )
    return GlobalState(cfg)  # type: ignore[arg-type]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_counters_survive_a_checkpoint_exactly(tmp_path: Path) -> None:
    saved = TrainState(
        step=3,
        consumed_train_samples=2**53 + 1,
        skipped_train_samples=5,
        consumed_validation_samples=7,
        consumed_tokens=2**62 + 1,
        floating_point_operations_so_far=1e24 + 1e9,
    )
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    loaded = TrainState()
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loaded == saved
    assert {value.dtype for value in saved.state_dict().values()} == {torch.int64, torch.float64}


def test_a_train_state_that_does_not_fit_changes_nothing() -> None:
    state = TrainState(step=4)
    good = TrainState(step=9).state_dict()
    missing = {name: value for name, value in good.items() if name != "consumed_tokens"}
    with pytest.raises(ValueError, match=r"missing \['consumed_tokens'\], unknown \['more'\]"):
        state.load_state_dict({**missing, "more": torch.tensor(1)})
    with pytest.raises(ValueError, match="consumed_tokens is torch.float32"):
        state.load_state_dict({**good, "consumed_tokens": torch.tensor(1.0)})
    assert state == TrainState(step=4)


def test_reading_a_logger_that_is_not_open_writes_nothing_and_says_how_to_open_it(
    tmp_path: Path,
) -> None:
    state = state_for(tmp_path / "run")
    for name in ("metric_loggers", "tensorboard_logger"):
        with pytest.raises(RuntimeError, match=r"call state.open_loggers\(step\) first"):
            getattr(state, name)
    assert state.wandb_logger is None
    assert not (tmp_path / "run").exists()
    state.close()
    assert not (tmp_path / "run").exists()


def test_rank_zero_logs_to_the_run_directory(tmp_path: Path) -> None:
    state = state_for(tmp_path)
    assert state.open_loggers(0) is state.metric_loggers
    state.metric_loggers.log({"lm loss": 2.0}, 1)
    assert state.tensorboard_logger is not None
    assert state.wandb_logger is None
    with pytest.raises(RuntimeError, match="open already"):
        state.open_loggers(0)
    state.close()
    state.close()
    assert rows(tmp_path) == [{"step": 1, "lm loss": 2.0}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = state_for(tmp_path)
    assert state.tensorboard_logger is None
    state.open_loggers(0).log({"lm loss": 2.0}, 1)
    assert state.tensorboard_logger is None
    state.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    state = state_for(tmp_path, tensorboard=False)
    assert state.tensorboard_logger is None
    state.open_loggers(0).log({"lm loss": 2.0}, 1)
    assert state.tensorboard_logger is None
    state.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("step", "kept"), [(2, [0, 1, 2]), (0, [])])
def test_a_resumed_run_writes_the_steps_after_its_checkpoint_again(
    step: int, kept: list[int], tmp_path: Path
) -> None:
    first = state_for(tmp_path)
    first.open_loggers(0)
    for index in range(5):
        first.metric_loggers.log({"lm loss": 1.0}, index)
    first.close()

    resumed = state_for(tmp_path, resume=True)
    resumed.open_loggers(step).log({"lm loss": 2.0}, step + 1)
    resumed.close()
    assert [row["step"] for row in rows(tmp_path)] == [*kept, step + 1]


def test_two_states_share_nothing(tmp_path: Path) -> None:
    one, other = state_for(tmp_path / "one"), state_for(tmp_path / "other")
    one.train_state.step = 5
    one.open_loggers(5).log({"lm loss": 1.0}, 5)
    assert other.train_state.step == 0
    assert other.timers is not one.timers
    one.close()
    other.open_loggers(0).log({"lm loss": 1.0}, 1)
    other.close()
    assert (len(rows(tmp_path / "one")), len(rows(tmp_path / "other"))) == (1, 1)


def test_a_closed_state_gives_out_no_logger(tmp_path: Path) -> None:
    state = state_for(tmp_path)
    state.close()
    for name in ("metric_loggers", "tensorboard_logger", "wandb_logger"):
        with pytest.raises(RuntimeError, match="closed"):
            getattr(state, name)
    assert copy.copy(state.train_state) == TrainState()


def test_a_run_without_directory_has_nowhere_to_log() -> None:
    with pytest.raises(ValueError, match="checkpoint.run_dir is not set"):
        state_for(None).open_loggers(0)


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).parents[2] / "packages" / "bridge-state" / "README.md"
    example = readme.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme_example"})
    assert rows(tmp_path / "runs" / "line") == [{"step": 1, "lm loss": 2.5}]
