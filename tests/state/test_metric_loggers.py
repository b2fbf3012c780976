import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from bridge.training.metric_loggers import (
    JsonlLogger,
    MetricLoggers,
    TensorBoardLogger,
    WandbLogger,
    read_records,
    truncate_jsonl,
)
from bridge.training.usage_error import UsageError
from wandb_files import history, read_wandb

TRAIN = {"lm loss": 2.5, "consumed_samples": 32, "learning_rate": 1e-3}
VALIDATION = {"validation/lm loss": 2.25}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in path.read_text().splitlines()]


def read_tensorboard(directory: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("default")
def test_every_backend_has_the_same_names_and_values(tmp_path: Path) -> None:
    loggers = MetricLoggers(
        [
            JsonlLogger(tmp_path / "metrics.jsonl"),
            TensorBoardLogger(tmp_path / "tensorboard"),
            WandbLogger(tmp_path, project="unit", config={"seed": 1}),
        ]
    )
    with contextlib.closing(loggers):
        loggers.log(TRAIN, 10)
        loggers.log(VALIDATION, 10)
        loggers.log({**TRAIN, "lm loss": 2.0, "accuracy": None}, 20)
        loggers.sync()
        loggers.log({"a": math.nan, "b": -math.inf}, 30)

    expected = {
        (name, step): value
        for step, row in ((10, TRAIN | VALIDATION), (20, TRAIN | {"lm loss": 2.0}))
        for name, value in row.items()
    }
    in_json = {
        (name, row["step"]): value
        for row in read_records(tmp_path / "metrics.jsonl")
        for name, value in row.items()
        if name != "step" and value is not None
    }
    in_tensorboard = {
        (name, step): value
        for name, points in read_tensorboard(tmp_path / "tensorboard").items()
        for step, value in points.items()
    }
    (records,) = read_wandb(tmp_path)
    commits = history(records)
    in_wandb = {
        (name, row["step"]): float(value)
        for row in commits
        for name, value in row.items()
        if not name.startswith("_") and name != "step"
    }
    for found in (in_json, in_wandb, in_tensorboard):
        assert math.isnan(found.pop(("a", 30)))
        assert found.pop(("b", 30)) == -math.inf
    assert in_json == expected
    assert in_wandb == expected
    assert in_tensorboard == pytest.approx(expected, rel=1e-6)  # TensorBoard holds float32.
    assert [row["step"] for row in commits] == [10, 10, 20, 30]
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert run["config"]["update"]["seed"] == 1
    assert run["display_name"] == tmp_path.name


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("default")
def test_a_resumed_run_continues_its_wandb_run(tmp_path: Path) -> None:
    for start in (0, 1):
        logger = WandbLogger(tmp_path, project="unit", name="mine")
        logger.log({"lm loss": 2.0 - start}, 10 + start)
        if start:
            logger.mark_failed()
        logger.close()
        logger.close()
    first, second = read_wandb(tmp_path)
    runs = [r["run"] for records in (first, second) for r in records if r["type"] == "run"]
    assert runs[0]["run_id"] == runs[1]["run_id"]
    assert [run["display_name"] for run in runs] == ["mine", "mine"]
    assert [history(records)[0]["step"] for records in (first, second)] == [10, 11]
    assert [history(records)[0]["_step"] for records in (first, second)] == [0, 1]
    codes = [
        record["exit"].get("exit_code", 0)
        for records in (first, second)
        for record in records
        if record["type"] == "exit"
    ]
    assert codes == [0, 1]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"\xff\xfe", b"../../elsewhere", None])
def test_a_damaged_id_of_a_wandb_run_does_not_start_another(
    content: bytes | None, tmp_path: Path
) -> None:
    place = tmp_path / "wandb" / "run_id"
    if content is None:
        place.mkdir(parents=True)
    else:
        place.parent.mkdir()
        place.write_bytes(content)
    with pytest.raises(UsageError, match=f"^{place}: .*; write the id of the W&B run into it"):
        WandbLogger(tmp_path, project="unit")


@pytest.mark.parametrize(
    ("module", "build", "extra"),
    [
        ("wandb", lambda path: WandbLogger(path, project="unit"), "wandb"),
        ("torch.utils.tensorboard.writer", TensorBoardLogger, "tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named_with_its_install_line(
    module: str, build: Any, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'pip install "bridge-state\[{extra}\]"'):
        build(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_tensorboard_resumed_at_a_step_hides_the_points_from_there_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second are read in the order of this number, as text: 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    first = TensorBoardLogger(tmp_path)
    for step in range(1, 7):
        first.log({"lm loss": 1.0}, step)
    first.close()
    second = TensorBoardLogger(tmp_path, purge_step=5)
    second.log({"lm loss": 2.0}, 5)
    second.close()
    second.close()
    curves = read_tensorboard(tmp_path)
    assert curves == {"lm loss": {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0}}


def test_a_row_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "sub" / "metrics.jsonl")
    logger.log(TRAIN, 10)
    assert read_jsonl(logger.path) == [{"step": 10, **TRAIN}]
    assert list(read_jsonl(logger.path)[0])[0] == "step"
    logger.close()
    logger.close()


def test_a_value_that_json_does_not_have_differs_from_none(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logged = {"a": -math.inf, "b": math.inf, "c": None, "d": 2**60 + 1}
    logger.log({**logged, "e": math.nan}, 1)
    logger.log(logged | {"a": 1.0, "b": 2.0}, 2)
    logger.close()
    first, second = read_jsonl(logger.path)
    named = {"a": "-inf", "b": "inf", "e": "nan"}
    empty = {"step": 1, "a": None, "b": None, "c": None, "d": 2**60 + 1, "e": None}
    assert first == {**empty, "not_finite": named}
    assert second == {"step": 2, "a": 1.0, "b": 2.0, "c": None, "d": 2**60 + 1}
    restored, unchanged = read_records(logger.path)
    assert unchanged == second
    assert math.isnan(restored.pop("e"))
    assert restored == {"step": 1, **logged}


@pytest.mark.parametrize("name", ["step", "not_finite"])
def test_a_metric_cannot_take_the_name_of_a_key_of_the_row(name: str, tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=f'"{name}"'):
        logger.log({name: 3.0}, 1)
    logger.close()


def test_opening_a_file_whose_writer_was_killed_drops_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lm lo')
    logger = JsonlLogger(path)
    logger.log({"lm loss": 1.0}, 2)
    logger.close()
    assert read_jsonl(path) == [{"step": 1}, {"step": 2, "lm loss": 1.0}]


def test_a_step_may_have_several_rows_but_a_name_once(tmp_path: Path) -> None:
    with contextlib.closing(MetricLoggers([JsonlLogger(tmp_path / "metrics.jsonl")])) as loggers:
        loggers.log(TRAIN, 10)
        loggers.log(VALIDATION, 10)
        with pytest.raises(ValueError, match="step 10 already has a value for 'lm loss'"):
            loggers.log({"lm loss": 1.0}, 10)
        loggers.log(TRAIN, 11)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [10, 10, 11]


def test_a_step_never_goes_back() -> None:
    loggers = MetricLoggers()
    loggers.log(TRAIN, 10)
    with pytest.raises(ValueError, match="step 9 come after those of step 10"):
        loggers.log(TRAIN, 9)


def test_all_loggers_are_closed_even_if_one_fails(tmp_path: Path) -> None:
    class Broken:
        def sync(self) -> None:
            pass

        def log(self, metrics: object, step: int) -> None: ...
        def close(self) -> None:
            raise OSError("disk full")

    around = [JsonlLogger(tmp_path / "a"), JsonlLogger(tmp_path / "b")]
    with pytest.raises(OSError, match="disk full"):
        MetricLoggers([around[0], Broken(), around[1]]).close()
    assert all(logger._file.closed for logger in around)


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "l', b"\0\0\0\0", b"\0\0\0\n"])
def test_rows_after_the_checkpoint_and_a_torn_line_go(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = b"".join(b'{"step": %d, "lm loss": 1.5}\n' % step for step in (1, 2, 3, 4))
    path.write_bytes(rows + torn)
    assert truncate_jsonl(path, 2) == 2 + bool(torn)
    assert path.read_bytes() == rows[: len(rows) // 2]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncating_leaves_a_file_alone_that_has_nothing_to_remove(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_jsonl(path, 3) == 0
    path.write_text('{"step": 3}\n')
    before = path.stat()
    assert truncate_jsonl(path, 3) == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert truncate_jsonl(path, -1) == 1
    assert path.read_bytes() == b""


def test_a_file_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot a row\n{"step": 9}\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        truncate_jsonl(path, 3)
    assert path.read_text() == '{"step": 1}\nnot a row\n{"step": 9}\n'
