"""Actions on a bad loss of one of two ranks: both raise, warn or skip the step."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, override

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from bridge.training.config import ConfigContainer, TrainConfig
from bridge.training.gpt_step import forward_step as gpt_forward_step
from bridge.training.loss.anomalies import WINDOW
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.pretrain import pretrain
from bridge.training.run import Run
from bridge.training.state import GlobalState
from bridge.training.step.rerun import RerunRequest
from bridge.training.train import train
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import (
    OwnData,
    OwnModel,
    a_run,
    gpt_run,
    one_step,
    own_run,
    parameters_of,
    series,
    token_step,
)

NAN, INF = float("nan"), float("inf")
SPIKE = 100.0
"""The loss of the tests' models times this is a spike."""

LAYOUTS: dict[str, dict[str, Any] | None] = {
    "data": None,
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
}

type Bad = dict[int, float]
"""The factor of the first loss of a step on rank 1, for the steps that have one."""


def a_step(layout: dict[str, Any] | None, bad: Bad) -> Callable[..., Any]:
    """Return the forward step of a layout, with bad losses on the last rank."""
    poisoned = set()

    def step(state: GlobalState, data_iterator: Any, model: Any) -> Any:
        if layout is None:
            output, loss_function = token_step(data_iterator, model)
        else:
            output, loss_function = gpt_forward_step(state, data_iterator, model)
        number = state.train_state.step + 1
        factor = 1.0
        last = dist.get_rank() + 1 == dist.get_world_size()
        if last and model.training and number not in poisoned:
            factor = bad.get(number, 1.0)
            poisoned.add(number)
        return output, lambda out: times(factor, *loss_function(out))

    return step


def times(factor: float, loss: torch.Tensor, count: torch.Tensor, metrics: Any) -> Any:
    """Multiply a loss, and the sums of its metrics."""
    sums = torch.tensor([factor, 1.0])
    return loss * factor, count, {key: value * sums for key, value in metrics.items()}


def a_config(directory: Path, layout: dict[str, Any] | None, **settings: Any) -> ConfigContainer:
    values: dict[str, Any] = {"train_iters": 6, "spike_factor": 5.0, **settings}
    if layout is None:
        train = TrainConfig(global_batch_size=8, micro_batch_size=2, **values)
        return own_run(directory, train=train)
    train = TrainConfig(global_batch_size=4, micro_batch_size=1, **values)
    return gpt_run(directory, tiny_gpt(num_layers=2, **layout), train=train)


@contextlib.contextmanager
def warmed_up(config: ConfigContainer, layout: Any, bad: Bad) -> Iterator[Run]:
    """Set up a run whose mean is that of enough steps, with losses as they are at the start."""
    with a_run(config, a_step(layout, bad)) as run:
        mean = 2.0 if layout is None else 4.2
        run.parts.forward_step.watch.load_state_dict({"mean": mean, "steps": float(WINDOW)})
        yield run


def everything_of(run: Run) -> dict[str, torch.Tensor]:
    """Return copies of the parameters and of the optimizer's state of each."""
    with parameters_in_sync(run.parts.model):
        found = parameters_of(run.parts.model)
    for index, part in enumerate(run.parts.optimizer.chained_optimizers):
        for number, (main, state) in enumerate(part.optimizer.state.items()):
            found[f"{index}.{number}"] = main.detach().clone()
            for name, value in state.items():
                found[f"{index}.{number}.{name}"] = value.clone()
    return found


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def on_two_ranks(body: Callable[[], Any]) -> list[Any]:
    return run_ranks(2, body, timeout=120)


# ---- skip ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["data", "pipeline"])
def test_a_run_with_skipped_steps_is_the_run_that_never_saw_their_batches(
    tmp_path: Path, layout: str
) -> None:
    skip: dict[str, Any] = {"nan_action": "skip", "spike_action": "skip"}

    def body() -> Any:
        sizes = LAYOUTS[layout]
        config = a_config(tmp_path / "skips", sizes, **skip)
        batch = config.train.global_batch_size
        with warmed_up(config, sizes, {2: NAN, 3: INF, 5: SPIKE}) as run:
            arguments: dict[str, Any] = {
                "data_iterator": run.parts.data.training(0),
                "before_optimizer_step": lambda: stepped.append(
                    run.parts.state.train_state.step + 1
                ),
            }
            stepped: list[int] = []
            results = []
            for _ in range(6):
                before = everything_of(run)
                results.append(one_step(run, **arguments))
                if results[-1].skipped:
                    assert_equal(before, everything_of(run))
            assert stepped == [1, 4, 6]
            found = everything_of(run)
            counters = run.parts.state.train_state
            assert counters.step == 6
            assert counters.consumed_train_samples == 6 * batch
            assert counters.skipped_train_samples == 3 * batch
            warnings = run.parts.forward_step.watch.check(config.train)
        with a_run(a_config(tmp_path / "never", sizes, **skip), a_step(sizes, {})) as run:
            wanted = [
                one_step(run, data_iterator=run.parts.data.training(index * batch))
                for index in (0, 3, 5)
            ]
            assert_equal(found, everything_of(run))
        assert [result.skipped for result in results] == [False, True, True, False, True, False]
        taken = [result for result in results if not result.skipped]
        for key in ("learning_rate", "grad_norm"):
            assert [getattr(r, key) for r in taken] == [getattr(r, key) for r in wanted]
        assert all(result.grad_norm is None for result in results if result.skipped)
        return warnings

    for warnings in on_two_ranks(body):
        assert len(warnings) == 2
        assert "skip). rank 1: nan at step 2, microbatch 0 (and 1 later)" in warnings[0]
        assert "skip). rank 1: " in warnings[1]
        assert "at step 5, microbatch 0, where the mean is " in warnings[1]


class NormedModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.outer = torch.nn.Linear(4, 1)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.outer(self.norm(x.transpose(1, 2)).transpose(1, 2))
        return output.squeeze(-1)


class Normed(OwnModel):
    @override
    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        return NormedModule()


ROUTED: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}


@pytest.mark.parametrize("kind", ["running statistics", "experts' bias"])
def test_a_skipped_step_leaves_no_trace_in_the_buffers(tmp_path: Path, kind: str) -> None:
    def body() -> None:
        layout = None if kind == "running statistics" else ROUTED
        config = a_config(tmp_path / "run", layout, nan_action="skip")
        if layout is None:
            config.model = Normed()
        with a_run(config, a_step(layout, {2: NAN})) as run:
            states = []
            for _ in range(3):
                one_step(run)
                buffers = run.parts.model[0].named_buffers()
                states.append({name: value.clone() for name, value in buffers})
            assert_equal(states[0], states[1])
            last = ("running_mean", "expert_bias")
            watched = [name for name in states[0] if name.endswith(last)]
            assert watched
            assert not any(torch.equal(states[1][name], states[2][name]) for name in watched)

    run_ranks(1, body, timeout=120)


def strictly(text: str) -> Any:
    def reject(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=reject)


def with_output(body: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result of `body` and its output for the user."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        return body(), stream.getvalue()


def test_a_skipped_step_is_reported_and_leaves_nothing_behind_in_the_run(tmp_path: Path) -> None:
    def body(iterations: int, resume: bool) -> Any:
        config = a_config(tmp_path / "run", None, nan_action="skip", train_iters=iterations)
        config.scheduler.lr_warmup_fraction = None
        config.scheduler.lr_decay_style = "constant"
        config.logger.tensorboard = True
        config.dataset = OwnData(validation=8)
        config.checkpoint.save_at_end = True
        config.checkpoint.resume = resume
        result, text = with_output(lambda: pretrain(config, a_step(None, {3: NAN, 4: INF, 6: NAN})))
        return result.step, result.validation["error"], text

    first = on_two_ranks(partial(body, 4, False))
    second = on_two_ranks(partial(body, 7, True))
    for found, steps in ((first, 4), (second, 7)):
        assert [rank[0] for rank in found] == [steps] * 2
        assert all(0 < rank[1] < 10 for rank in found)
    lines = [line for line in first[0][2].splitlines() if "warning" in line]
    assert lines == [
        "warning: The loss is not finite (train.nan_action=skip). "
        f"rank 1: {value} at step {step}, microbatch 0"
        for step, value in ((3, "nan"), (4, "inf"))
    ]
    assert "1 skipped" in first[0][2]
    assert first[1][2] == ""
    texts = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    trained = [row for row in map(strictly, texts) if "learning_rate" in row]
    bad = [None if row["step"] in (3, 4, 6) else 0 for row in trained]
    assert [None if row["error"] is None else 0 for row in trained] == bad
    assert [None if row["grad_norm"] is None else 0 for row in trained] == bad
    assert [row["skipped_steps"] for row in trained] == [0, 0, 1, 1, 0, 1, 0]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("learning_rate")] == [1, 2, 3, 4, 5, 6, 7]


# ---- raise, raise_at_once --------------------------------------------------------------------

KINDS = {"nan": NAN, "inf": INF, "spike": SPIKE}


@pytest.mark.parametrize(
    ("layout", "action"),
    [("data", "raise"), ("tensor", "raise_at_once"), ("pipeline", "raise")],
)
def test_an_error_comes_on_every_rank_at_its_time(tmp_path: Path, layout: str, action: Any) -> None:
    def body() -> list[Any]:
        sizes = LAYOUTS[layout]
        found = []
        for kind, factor in KINDS.items():
            config = a_config(tmp_path / kind, sizes, nan_action=action, spike_action=action)
            config.logger.log_interval = 2
            with warmed_up(config, sizes, {3: factor}) as run:
                with pytest.raises(FloatingPointError) as error:
                    train(run)
                found.append((kind, run.phase, run.parts.state.train_state.step, str(error.value)))
        return found

    one, other = on_two_ranks(body)
    assert one == other
    assert [kind for kind, *_ in one] == list(KINDS)
    for kind, phase, step, message in one:
        # Found when step 4 is logged, or before the optimizer's step 3.
        assert (phase, step) == (("step 4", 4) if action == "raise" else ("step 3", 2))
        if kind == "spike":
            assert "The loss is above train.spike_factor=5.0 times its recent mean" in message
            assert " at step 3, microbatch 0, where the mean is " in message
        else:
            assert f"The loss is not finite (train.nan_action={action})." in message
            assert f"rank 1: {kind} at step 3, microbatch 0" in message
        # By step 4 the weights are NaN on every rank.
        assert "rank 0: " not in message.replace("rank 0: nan at step 4", "")


# ---- log -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_a_logged_anomaly_is_a_warning_and_the_step_is_taken(tmp_path: Path, layout: str) -> None:
    def body() -> Any:
        sizes = LAYOUTS[layout]
        lines: list[str] = []
        config = a_config(tmp_path / "run", sizes, nan_action="log", train_iters=4)
        config.logger.log_interval = 2
        with warmed_up(config, sizes, {1: SPIKE, 4: NAN}) as run:
            run.progress.note = lines.append  # type: ignore[assignment,method-assign]
            assert train(run) == "finished"
            with parameters_in_sync(run.parts.model):
                spoilt = any(
                    value.isnan().any() for value in parameters_of(run.parts.model).values()
                )
        return [line for line in lines if line.startswith("warning")], spoilt

    for warnings, spoilt in on_two_ranks(body):
        assert len(warnings) == 2
        assert "rank 1" in warnings[0]
        assert "at step 1, microbatch 0, where the mean is " in warnings[0]
        assert "(train.nan_action=log). rank 1: nan at step 4, microbatch 0" in warnings[1]
        assert spoilt


def test_a_checkpoint_follows_the_warning(tmp_path: Path) -> None:
    def body() -> list[str]:
        config = a_config(tmp_path / "run", None, nan_action="log", train_iters=4)
        config.logger.log_interval = 4
        config.checkpoint.save_interval = 2
        lines = with_output(lambda: pretrain(config, a_step(None, {2: NAN})))[1].splitlines()
        return [line.split()[0] for line in lines if line.startswith(("warning", "saved"))]

    # Step 4 and its checkpoint have NaN losses of their own: the weights are spoilt.
    assert on_two_ranks(body) == [["warning:", "saved", "warning:", "saved"], []]
    (row,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert (strictly(row)["step"], strictly(row)["error"]) == (4, None)


# ---- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["raise", "raise_at_once", "skip", "log"])
def test_a_bad_loss_of_an_evaluation_is_an_error_or_a_warning(tmp_path: Path, action: Any) -> None:
    def step(data_iterator: Any, model: Any) -> Any:
        output, loss_function = token_step(data_iterator, model)
        bad = not model.training and dist.get_rank() == 1
        return output, lambda out: times(NAN if bad else 1.0, *loss_function(out))

    def body() -> Any:
        config = a_config(tmp_path / "run", None, nan_action=action, train_iters=3)
        config.dataset = OwnData(validation=8)
        config.validation.eval_interval = 2
        raised = None

        def run() -> None:
            nonlocal raised
            try:
                pretrain(config, step)
            except FloatingPointError as error:
                raised = str(error)

        text = with_output(run)[1]
        return raised, [line for line in text.splitlines() if line.startswith("warning")]

    found = on_two_ranks(body)
    message = (
        f"The loss is not finite (train.nan_action={action}). "
        "rank 1: nan at validation at step {}, microbatch 0 (and 1 later)"
    )
    if action.startswith("raise"):
        assert found == [(message.format(2), [])] * 2
        assert series(tmp_path / "run", "validation/error") == []
    else:
        warnings = [f"warning: {message.format(step)}" for step in (2, 3)]
        assert found == [(None, warnings), (None, [])]
        assert series(tmp_path / "run", "validation/error") == [None, None]
        assert None not in series(tmp_path / "run", "error")


# ---- the mean over a resume ------------------------------------------------------------------

CUT = WINDOW + 2


def long_run(directory: Path, until: int, *, resume: bool, forget: bool = False) -> list[str]:
    """Train on to step `until`, with a spike after the cut; return the warnings."""
    config = a_config(directory, None, train_iters=CUT + 3)
    config.checkpoint.save_interval = CUT
    config.checkpoint.resume = resume
    lines: list[str] = []
    with a_run(config, a_step(None, {CUT + 2: SPIKE})) as run:
        if forget:
            save = run.parts.checkpointer._sharded_state

            def in_the_older_form(**arguments: Any) -> Any:
                state = save(**arguments)
                for key in [key for key in state if key.startswith("rng_")]:
                    del state[key].data["loss_watch"]
                return state

            run.parts.checkpointer._sharded_state = in_the_older_form  # type: ignore[method-assign]
        run.progress.note = lines.append  # type: ignore[assignment,method-assign]
        run.parts.data.train_iters = until
        train(run)
    return [line for line in lines if line.startswith("warning")]


def test_the_mean_survives_an_exact_resume(tmp_path: Path) -> None:
    def body() -> tuple[list[str], list[str]]:
        whole = long_run(tmp_path / "whole", CUT + 3, resume=False)
        assert long_run(tmp_path / "cut", CUT, resume=False) == []
        return whole, long_run(tmp_path / "cut", CUT + 3, resume=True)

    for whole, continued in on_two_ranks(body):
        assert len(whole) == 1
        assert f"at step {CUT + 2}, microbatch 0, where the mean is " in whole[0]
        assert whole == continued


def test_a_checkpoint_of_the_older_form_and_another_layout_start_the_mean_afresh(
    tmp_path: Path,
) -> None:
    def older() -> list[str]:
        long_run(tmp_path / "older", CUT, resume=False, forget=True)
        return long_run(tmp_path / "older", CUT + 3, resume=True)

    assert on_two_ranks(older) == [[], []]
    on_two_ranks(lambda: long_run(tmp_path / "layout", CUT, resume=False))
    alone = run_ranks(1, lambda: long_run(tmp_path / "layout", CUT + 3, resume=True), timeout=120)
    assert alone == [[]]


# ---- the rerun state machine -----------------------------------------------------------------


@pytest.mark.parametrize("action", ["skip", "log"])
def test_the_rerun_machine_saves_and_ends_the_run_all_the_same(tmp_path: Path, action: Any) -> None:
    def always(state: GlobalState, data_iterator: Any, model: Any) -> Any:
        output, loss_function = token_step(data_iterator, model)
        bad = state.train_state.step == 1
        return output, lambda out: times(INF if bad else 1.0, *loss_function(out))

    def body() -> Any:
        config = a_config(tmp_path / "run", None, nan_action=action)
        config.rerun.rerun_mode = "validate_results"
        with pytest.raises(RerunRequest) as error:
            pretrain(config, always)
        return error.value.exit_code

    assert on_two_ranks(body) == [16, 16]
    assert (tmp_path / "run" / "checkpoints" / "step-0000001").is_dir()
