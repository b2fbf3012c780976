"""A callback collects other data of the loss function without changing the run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.training.callbacks import CallbackContext
from bridge.training.pretrain import pretrain
from bridge.training.state import GlobalState
from ranks import run_ranks
from training_runs import OwnData, OwnModel, Samples, a_run, own_run, rows, token_step
from validation_sets import FIRST, NamedData


def outputs_step(state: GlobalState, data_iterator: Iterator[Any], model: Any) -> Any:
    """Collects the inputs of each microbatch, and how it was computed."""
    batch = next(data_iterator)

    def loss_function(output: torch.Tensor, non_loss_data: bool = False) -> Any:
        assert non_loss_data
        return {
            "x": batch["x"].tolist(),
            "gradients": output.requires_grad or torch.is_grad_enabled(),
            "training": model.training,
            "step": state.train_state.step,
        }

    return model(batch["x"]), loss_function


def inputs(first: int, microbatches: list[int]) -> list[Any]:
    """Return the inputs of microbatches of two samples each."""
    data = Samples(100, first)
    return [
        [data[2 * number + sample]["x"].tolist() for sample in (0, 1)] for number in microbatches
    ]


class Collector:
    """A callback that collects at every event."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.found: list[Any] = []

    def collect(self, context: CallbackContext, *_: Any) -> None:
        before = vars(context.state.train_state).copy()
        self.found.append(context.collect_non_loss_data(**self.arguments))
        assert vars(context.state.train_state) == before

    on_train_start = on_train_end = on_step_start = collect
    on_evaluate_start = on_checkpoint_save = collect

    def on_step_end(self, context: CallbackContext, result: Any) -> None:
        self.collect(context)

    def on_evaluate_end(self, context: CallbackContext, results: Any) -> None:
        self.collect(context)

    def on_log(self, context: CallbackContext, metrics: Any) -> None:
        self.collect(context)

    def on_before_optimizer_step(self, context: CallbackContext) -> None:
        self.collect(context)


def test_a_run_that_collects_at_every_event_is_the_run_that_does_not(tmp_path: Path) -> None:
    def body(name: str, callbacks: list[Any]) -> Any:
        config = own_run(
            tmp_path / name, dataset=OwnData(validation=24), model=OwnModel(dropout=0.3)
        )
        config.validation.eval_interval = 2
        config.validation.eval_iters = 2
        config.checkpoint.save_interval = 3
        result = pretrain(config, token_step, callbacks)
        return dict(result.validation)

    def both() -> Any:
        collector = Collector(forward_step_func=outputs_step)
        return body("collects", [collector]), body("does not", []), collector.found

    timed = {"step_time_s", "tokens_per_s", "samples_per_s"}
    for rank, (collects, does_not, found) in enumerate(run_ranks(2, both, timeout=120)):
        assert collects == does_not
        assert len(found) == 2 + 5 * 4 + 3 * 2 + 1
        for items in found:
            assert [item["x"] for item in items] == inputs(FIRST["wiki"], [*range(rank, 8, 2)])
            assert not any(item["gradients"] or item["training"] for item in items)
        assert [items[0]["step"] for items in (found[0], found[-1])] == [0, 5]
    written, wanted = (
        [{key: value for key, value in row.items() if key not in timed} for row in rows(path)]
        for path in (tmp_path / "collects", tmp_path / "does not")
    )
    assert written == wanted


def test_a_set_is_chosen_by_its_name_and_drawn_from_its_beginning(tmp_path: Path) -> None:
    def body() -> Any:
        data = NamedData(validation={"wiki": 9, "code": 16}, test={"test": 8})
        with a_run(own_run(tmp_path / "run", dataset=data), token_step) as run:
            collect = run.context.collect_non_loss_data
            found = [
                [item["x"] for item in collect(outputs_step, name, number)]
                for name, number in (
                    ("validation/code", 8),
                    ("validation/code", 12),
                    ("test/test", 4),
                )
            ]
            wrong = []
            for name, number in (
                ("validation", None),
                ("validation/wiki", 12),
                ("validation/wiki", 0),
            ):
                with pytest.raises(ValueError, match="data|samples") as error:
                    collect(outputs_step, name, number)
                wrong.append(str(error.value))
            return found, wrong

    for rank, (found, wrong) in enumerate(run_ranks(2, body, timeout=120)):
        assert found == [
            inputs(FIRST["code"], [*range(rank, 4, 2)]),
            inputs(FIRST["code"], [*range(rank, 6, 2)]),
            inputs(FIRST["test"], [rank]),
        ]
        assert wrong[0] == (
            "there is no 'validation' data; there is validation/wiki, validation/code, test/test"
        )
        for message, number in zip(wrong[1:], (12, 0), strict=True):
            assert message == (
                f"num_samples={number}: the set has 9 samples; give a number from 1 to 9"
            )


def test_the_runs_own_step_is_the_default(tmp_path: Path) -> None:
    def body() -> Any:
        with a_run(own_run(tmp_path / "run", dataset=OwnData(validation=8)), token_step) as run:
            items = run.context.collect_non_loss_data()
            return [(float(total), int(count)) for total, count, _ in items]

    data = Samples(8, FIRST["wiki"])
    for rank, found in enumerate(run_ranks(2, body, timeout=120)):
        counts = [
            int(sum(data[2 * number + sample]["mask"].sum() for sample in (0, 1)))
            for number in range(rank, 4, 2)
        ]
        assert [count for _, count in found] == counts
        assert all(total > 0 for total, _ in found)


def test_a_step_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    def failing(data_iterator: Any, model: Any) -> Any:
        raise ZeroDivisionError

    def body() -> None:
        with a_run(own_run(tmp_path / "run", dataset=OwnData(validation=8)), token_step) as run:
            with pytest.raises(ZeroDivisionError):
                run.context.collect_non_loss_data(failing)
            assert run.parts.model[0].training
            # The loop would continue here.
            assert len(run.context.collect_non_loss_data()) == 2

    run_ranks(2, body, timeout=120)


def test_a_context_without_a_run_has_nothing_to_collect() -> None:
    context = CallbackContext(state=None, model=[])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="belongs to no run"):
        context.collect_non_loss_data()


def test_nothing_is_drawn_where_evaluation_is_off(tmp_path: Path) -> None:
    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.validation.eval_iters = 0
        with a_run(config, token_step) as run:
            none = run.context.collect_non_loss_data()
            some = run.context.collect_non_loss_data(num_samples=8)
            return len(none), len(some), dist.get_world_size()

    assert run_ranks(2, body, timeout=120) == [(0, 2, 2)] * 2
