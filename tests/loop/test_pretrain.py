"""`pretrain` from inside another program: its result, and no trace left behind."""

import json
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bridge.training import cpu
from bridge.training.checkpoint.manifest import write_manifest
from bridge.training.config import TrainConfig, ValidationConfig
from bridge.training.pretrain import pretrain
from process_footprint import take_footprint
from ranks import RankFailure, run_ranks
from training_runs import OwnData, own_run, rows, series, token_step


def fails_at(step: int) -> Any:
    calls: list[int] = []

    def failing(data_iterator: Iterator[Any], model: Any) -> Any:
        calls.append(1)
        if len(calls) > (step - 1) * 4:
            raise ZeroDivisionError("the user's own")
        return token_step(data_iterator, model)

    return failing


def enter_new_folders() -> None:
    """Give this rank a working directory and a folder for temporary files of its own."""
    os.chdir(tempfile.mkdtemp())
    tempfile.tempdir = tempfile.mkdtemp()


OF_DEFAULT_GROUP = {"hooks", "threads", "descriptors"}
"""With the default group torch replaces sys.excepthook; threads and sockets of gloo end later."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_leaves_the_process_as_it_was(tmp_path: Path, world_size: int) -> None:
    def body() -> None:
        cpu.disable()
        enter_new_folders()
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        metrics = []
        # The modules that the first run imports, and the threads of a pool, stay.
        for name in ("first", "second"):
            before = take_footprint()
            assert not dist.is_initialized()
            config = own_run(tmp_path / name, dataset=OwnData(validation=8))
            config.logger.tensorboard = config.checkpoint.save_at_end = True
            metrics.append(pretrain(config, token_step).metrics["error"])
            changes = before.changes_until(take_footprint())
            assert name == "first" or changes.keys() <= OF_DEFAULT_GROUP
            # Rendezvous of the next run: a launcher starts a process for each.
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        before = take_footprint()
        with pytest.raises(ZeroDivisionError):
            pretrain(own_run(tmp_path / "third"), fails_at(2))
        assert before.changes_until(take_footprint()).keys() <= OF_DEFAULT_GROUP
        assert metrics[0] == metrics[1]

    run_ranks(world_size, body, timeout=120, process_group=False)


def test_one_run_after_another_under_a_launcher_whose_store_outlives_both(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body() -> list[float]:
        os.environ.update(MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
        runs = [own_run(tmp_path / name, dataset=OwnData()) for name in ("first", "second")]
        return [pretrain(run, token_step).metrics["error"] for run in runs]

    first, second = run_ranks(2, body, process_group=False, timeout=40)
    assert first == second
    assert first[0] == first[1]


def test_groups_that_were_there_stay_and_are_used(tmp_path: Path) -> None:
    def body() -> None:
        enter_new_folders()
        pretrain(own_run(tmp_path / "default"), token_step)
        parallel_state.initialize_model_parallel()
        group = parallel_state.get_data_parallel_group()
        before = take_footprint()
        pretrain(own_run(tmp_path / "all"), token_step)
        assert before.changes_until(take_footprint()) == {}
        assert parallel_state.get_data_parallel_group() is group
        ones = torch.ones(())
        dist.all_reduce(ones, group=group)
        assert ones == 2

    run_ranks(2, body, timeout=120)
    assert series(tmp_path / "default", "error") == series(tmp_path / "all", "error")


def test_groups_of_another_layout_are_rejected(tmp_path: Path) -> None:
    def body() -> None:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        with pytest.raises(ValueError, match="sizes tensor 1.* already with tensor 2"):
            pretrain(own_run(tmp_path / "run"), token_step)
        assert parallel_state.get_tensor_model_parallel_world_size() == 2

    run_ranks(2, body, timeout=120)
    assert not (tmp_path / "run").exists()


class Listener:
    """A callback that records the events, and fails in one if asked to."""

    def __init__(self, fails_in: str | None = None) -> None:
        self.events: list[str] = []
        self.fails_in = fails_in

    def _hear(self, event: str) -> None:
        self.events.append(event)
        if event == self.fails_in:
            raise ZeroDivisionError

    def on_train_start(self, context: Any) -> None:
        self._hear("start")

    def on_evaluate_start(self, context: Any) -> None:
        self._hear("evaluate")

    def on_step_end(self, context: Any, result: Any) -> None:
        self._hear("step")

    def on_before_optimizer_step(self, context: Any) -> None:
        assert any(p.main_grad.abs().sum() > 0 for p in context.model[0].parameters())
        self._hear("gradients")

    def on_log(self, context: Any, metrics: dict[str, Any]) -> None:
        metrics["extra"] = 1.0
        self._hear("log")

    def on_checkpoint_save(self, context: Any, path: Path) -> None:
        self._hear("save")

    def on_train_end(self, context: Any) -> None:
        self._hear(f"end {type(context.exception).__name__}")


def test_callbacks_hear_every_event_in_order(tmp_path: Path) -> None:
    def body() -> list[str]:
        listener = Listener()
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.train.train_iters = 2
        config.validation = ValidationConfig(eval_at_start=True)
        config.checkpoint.save_at_end = True
        pretrain(config, token_step, [listener])
        return listener.events

    step = ["gradients", "step", "log"]
    expected = ["start", "evaluate", *step, *step, "save", "evaluate", "end NoneType"]
    assert run_ranks(1, body, timeout=120) == [expected]
    assert series(tmp_path / "run", "extra") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("fails_in", "phase"),
    [
        ("gradients", "in step 1"),
        ("step", "in step 1"),
        ("evaluate", "in validation at step 1"),
        ("save", "in checkpoint at step 1"),
    ],
)
def test_an_error_says_the_rank_and_the_phase(tmp_path: Path, fails_in: str, phase: str) -> None:
    def body() -> tuple[list[str], list[str]]:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.validation.eval_interval = config.checkpoint.save_interval = 1
        listener = Listener(fails_in)
        with pytest.raises(ZeroDivisionError) as error:
            pretrain(config, token_step, [listener])
        return error.value.__notes__, listener.events

    for rank, (notes, events) in enumerate(run_ranks(2, body, timeout=120)):
        assert notes[-1] == f"rank {rank}, {phase}"
        assert "Listener.on_" in notes[0]
        assert events[-1] == "end ZeroDivisionError"
        assert events.count("start") == 1


def test_an_error_of_the_forward_step_keeps_its_type_and_closes_the_run(tmp_path: Path) -> None:
    def body() -> Any:
        seen = []

        class Keep:
            def on_train_start(self, context: Any) -> None:
                seen.append(context.state)

        with pytest.raises(ZeroDivisionError, match="the user's own") as error:
            pretrain(own_run(tmp_path / "run"), fails_at(3), [Keep()])
        with pytest.raises(RuntimeError, match="closed"):
            _ = seen[0].tensorboard_logger
        return error.value.__notes__

    assert run_ranks(1, body, timeout=120) == [["rank 0, in step 3"]]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def test_the_state_is_closed_at_the_end(tmp_path: Path) -> None:
    def body() -> None:
        seen = []

        class Keep:
            def on_train_start(self, context: Any) -> None:
                seen.append(context.state)

        pretrain(own_run(tmp_path / "run"), token_step, [Keep()])
        with pytest.raises(RuntimeError, match="closed"):
            _ = seen[0].metric_loggers, seen[0].tensorboard_logger

    run_ranks(1, body, timeout=120)


def test_the_result_is_equal_on_every_rank(tmp_path: Path) -> None:
    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8, test=16))
        result = pretrain(config, token_step)
        return (
            (result.reason, result.step, result.consumed_samples, result.run_dir),
            result.metrics["error"],
            result.metrics["step"],
            dict(result.validation),
        )

    one, other = run_ranks(2, body, timeout=120)
    assert one == other
    assert one[0] == ("finished", 5, 40, tmp_path / "run")
    assert one[2] == 5
    assert list(one[3]) == ["error"]
    assert series(tmp_path / "run", "validation/error") == [one[3]["error"]]
    assert len(series(tmp_path / "run", "test/error")) == 1


def test_a_run_that_had_finished_is_only_recalled(tmp_path: Path) -> None:
    def body(resume: bool) -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8, test=8))
        config.checkpoint.save_at_end = True
        config.checkpoint.resume = resume
        result = pretrain(config, token_step)
        return result.step, result.metrics, result.validation

    first = run_ranks(2, body, False, timeout=120)
    written = rows(tmp_path / "run")
    again = run_ranks(2, body, True, timeout=120)
    assert rows(tmp_path / "run") == written
    assert [result[2] for result in again] == [first[0][2]] * 2
    assert again[0] == again[1] == first[0]


def remove_records(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


def edit_records(run: Path) -> None:
    """Give every record of the last step another step."""
    edited = [row | {"step": min(row["step"], 3)} for row in rows(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in edited))


@pytest.mark.parametrize("change", [remove_records, edit_records])
def test_a_finished_run_takes_its_metrics_from_the_checkpoint_and_is_not_evaluated_again(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """The content of metrics.jsonl does not matter."""

    def body(resume: bool) -> Any:
        evaluated = []

        class Listener:
            def on_evaluate_start(self, context: Any) -> None:
                evaluated.append(context.split)

        config = own_run(tmp_path / "run", dataset=OwnData(validation=8, test=8))
        config.checkpoint.save_at_end, config.checkpoint.resume = True, resume
        result = pretrain(config, token_step, [Listener()])
        return (dict(result.metrics), dict(result.validation)), evaluated

    first = run_ranks(2, body, False, timeout=120)
    assert first[0][1] == ["validation", "test"]
    change(tmp_path / "run")
    assert run_ranks(2, body, True, timeout=120) == [(first[0][0], [])] * 2
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    for damaged in (
        "{",
        "[" * 100_000,
        "\udcff\udcfe",
        "null",
        '{"validation": {"step": 5}}',
        '{"validation": {"step": "5", "metrics": {}}}',
        '{"validation": {"step": 5, "metrics": [1]}}',
        '{"validation": {"step": 5, "metrics": {"lm loss": "low"}}}',
        '{"validation": {"step": 6, "metrics": {"lm loss": 0.0}}}',
    ):
        (saved / "evaluations.json").write_text(damaged, errors="surrogateescape")
        with pytest.raises(RankFailure, match="remove it to evaluate again"):
            run_ranks(2, body, True, timeout=120)


def test_a_checkpoint_without_metrics_recalls_none_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Older ones have none."""

    def body(resume: bool) -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.checkpoint.save_at_end, config.checkpoint.resume = True, resume
        result = pretrain(config, token_step)
        return dict(result.metrics), dict(result.validation)

    (first,) = run_ranks(1, body, False, timeout=120)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    (saved / "evaluations.json").unlink()
    state = json.loads((saved / "run_state.json").read_text())
    del state["results"]
    (saved / "run_state.json").write_text(json.dumps(state))
    write_manifest(saved, step=5)
    capfd.readouterr()
    assert run_ranks(1, body, True, timeout=120) == [({}, first[1])]
    assert "warning" not in capfd.readouterr().out


def test_a_signal_ends_the_run_after_the_step_on_every_rank(tmp_path: Path) -> None:
    def body() -> Any:
        class Interrupt:
            def on_step_start(self, context: Any) -> None:
                if context.state.train_state.step == 2 and dist.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.checkpoint.save_at_end = True
        result = pretrain(config, token_step, [Interrupt()])
        return result.reason, result.step, dict(result.validation)

    assert run_ranks(2, body, timeout=120) == [("SIGTERM", 3, {})] * 2
    assert (tmp_path / "run" / "checkpoints" / "step-0000003").is_dir()


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"epochs": 2}, 6), ({"train_samples": 16}, 2), ({"epochs": 1, "global_batch_size": 16}, 1)],
)
def test_the_length_of_a_run_in_samples_or_epochs(
    tmp_path: Path, length: dict[str, int], steps: int
) -> None:
    def body() -> int:
        config = own_run(tmp_path / "run")
        config.train = TrainConfig(**({"global_batch_size": 8} | length))  # type: ignore[arg-type]
        return pretrain(config, token_step).step

    assert run_ranks(1, body, timeout=120) == [steps]


def test_a_dataset_smaller_than_a_batch_is_gone_through_again(tmp_path: Path) -> None:
    def body(train: dict[str, int]) -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(train=3))
        config.train = TrainConfig(**({"global_batch_size": 8} | train))  # type: ignore[arg-type]
        return pretrain(config, token_step).consumed_samples

    def both() -> Any:
        with pytest.raises(ValueError, match="2 passes over 3 samples are less than one step"):
            body({"epochs": 2})
        return body({"train_iters": 2})

    assert run_ranks(1, both, timeout=120) == [16]
