"""The rerun state machine repeats steps without changing what is trained."""

from pathlib import Path
from typing import Any

import pytest

from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from bridge.training.state import GlobalState
from bridge.training.step.rerun import RerunRequest
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import TokenData, gpt_run, own_run, series, token_step


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    run_ranks(2, lambda: run_in(run, "disabled"), timeout=120)
    return run


def run_in(directory: Path, mode: Any, step: Any = forward_step) -> None:
    # Attention's dropout draws from the tensor-parallel stream, which the machine does not restore.
    model = tiny_gpt(num_layers=2, hidden_dropout=0.1, attention_dropout=0.3)
    config = gpt_run(directory, model, dataset=TokenData(validation=8))
    config.train.train_iters = 3
    config.validation.eval_interval = 1
    config.rerun.rerun_mode = mode
    pretrain(config, step)


@pytest.mark.parametrize("mode", ["validate_results", "report_determinism_stats"])
def test_a_watched_run_finds_the_same(tmp_path: Path, plain: Path, mode: str) -> None:
    calls: list[int] = []

    def body() -> int:
        def counted(state: GlobalState, data_iterator: Any, model: Any) -> Any:
            calls.append(1)
            return forward_step(state, data_iterator, model)

        run_in(tmp_path / "run", mode, counted)
        return len(calls)

    # Two microbatches a step, which the statistics repeat, and four an evaluation.
    repeated = 2 if mode == "report_determinism_stats" else 1
    assert run_ranks(2, body, timeout=120) == [3 * 2 * repeated + 3 * 4] * 2
    for name in ("lm loss", "grad_norm", "validation/lm loss"):
        assert series(tmp_path / "run", name) == series(plain, name)


def test_a_loss_that_is_wrong_once_ends_the_run_before_the_step(tmp_path: Path) -> None:
    calls: list[int] = []

    def flipped(data_iterator: Any, model: Any) -> Any:
        output, loss_function = token_step(data_iterator, model)
        calls.append(1)
        # Four microbatches a step: the first of step 2, and not when it is repeated.
        bad = len(calls) == 5
        return output, lambda out: loss_function(out * float("inf") if bad else out)

    def body() -> Any:
        steps = []

        class Steps:
            def on_step_end(self, context: Any, result: Any) -> None:
                steps.append(context.state.train_state.step)

        config = own_run(tmp_path / "run")
        config.rerun.rerun_mode = "validate_results"
        with pytest.raises(RerunRequest) as error:
            pretrain(config, flipped, [Steps()])
        return error.value.exit_code, error.value.__notes__, steps, len(calls)

    assert run_ranks(1, body, timeout=120) == [(17, ["rank 0, in step 2"], [1], 12)]


@pytest.mark.parametrize("check_for_nan", [True, False])
def test_a_loss_that_is_wrong_again_is_an_error_or_saved_for_other_hardware(
    tmp_path: Path, check_for_nan: bool
) -> None:
    def always(data_iterator: Any, model: Any) -> Any:
        output, loss_function = token_step(data_iterator, model)
        calls.append(1)
        return output, lambda out: loss_function(out * float("inf") if len(calls) > 4 else out)

    calls: list[int] = []

    def body() -> Any:
        config = own_run(tmp_path / "run")
        config.rerun.rerun_mode = "validate_results"
        config.train.check_for_nan = check_for_nan
        kind = FloatingPointError if check_for_nan else RerunRequest
        with pytest.raises(kind) as error:
            pretrain(config, always)
        return getattr(error.value, "exit_code", None)

    assert run_ranks(1, body, timeout=120) == [None if check_for_nan else 16]
    # The checkpoint has the state before the step.
    saved = tmp_path / "run" / "checkpoints" / "step-0000001"
    assert saved.is_dir() == (not check_for_nan)
