"""`train_step`: the step of plain torch, usable in a user's own loop."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from bridge.training.config import ConfigContainer, TrainConfig
from bridge.training.model.hooks import GradientFinalizer
from bridge.training.pretrain import pretrain
from plain_torch import drawn_sample, plain_torch
from ranks import run_ranks
from training_runs import (
    Killed,
    Killer,
    OwnData,
    OwnModel,
    a_run,
    mean_step,
    one_step,
    own_run,
    parameters_of,
    rows,
    series,
    token_step,
    trained,
)

STEPS = {1: mean_step, 2: token_step}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("pattern", [1, 2])
def test_steps_are_adamw_written_out(tmp_path: Path, pattern: int, world_size: int) -> None:
    def body(microbatches: int) -> dict[str, torch.Tensor]:
        config = own_run(tmp_path / f"{microbatches}")
        config.train.micro_batch_size = 8 // world_size // microbatches
        return trained(config, STEPS[pattern])[1]

    for microbatches in (1, 2):
        parameters = run_ranks(world_size, body, microbatches, timeout=120)
        run = tmp_path / f"{microbatches}"
        wanted = plain_torch(own_run(run), pattern=pattern, steps=5)
        assert series(run, "error") == pytest.approx(wanted.losses, rel=2e-6)
        assert series(run, "grad_norm") == pytest.approx(wanted.grad_norms, rel=1e-5)
        assert series(run, "learning_rate") == pytest.approx(wanted.rates, rel=1e-9)
        assert len(wanted.losses) == 5
        for of_rank in parameters:
            for name, value in wanted.parameters.items():
                torch.testing.assert_close(of_rank[name], value, rtol=2e-5, atol=2e-6)


def test_a_program_with_its_own_loop_gets_all_it_needs_from_the_result(tmp_path: Path) -> None:
    def body() -> list[Any]:
        with a_run(own_run(tmp_path / "run"), token_step) as run:
            silent = one_step(run)
            spoken = one_step(run, reducer=run.parts.reducer)
            counters = run.parts.state.train_state
            done = (counters.step, counters.consumed_train_samples, counters.consumed_tokens)
            return [silent.metrics, dict(spoken.metrics), float(spoken.grad_norm or 0), done]

    (found,) = run_ranks(1, body, timeout=120)
    wanted = plain_torch(own_run(tmp_path), pattern=2, steps=2)
    assert found[0] == {}
    assert found[1]["error"] == pytest.approx(wanted.losses[1], rel=2e-6)
    assert found[2] == pytest.approx(wanted.grad_norms[1], rel=1e-5)
    assert found[3] == (2, 16, 16 * 3)
    assert not (tmp_path / "run" / "checkpoints").exists()


@dataclass(kw_only=True)
class NoSequences(OwnModel):
    """A model whose samples have no length that the loop knows."""

    seq_length: int = 0

    def training_flops_per_token(self) -> float:
        return 10.0


def test_the_tokens_of_a_model_without_sequences_are_those_that_its_loss_counts(
    tmp_path: Path,
) -> None:
    def config_of(folder: str, **changes: Any) -> ConfigContainer:
        config = own_run(tmp_path / folder, model=NoSequences())
        config.train.train_iters, config.logger.log_interval = 5, 2
        config.checkpoint.save_interval, config.checkpoint.resume = 3, bool(changes)
        return config

    class Flops:
        def on_train_end(self, context: Any) -> None:
            self.number = context.state.train_state.floating_point_operations_so_far

    flops = Flops()

    def body() -> list[Any]:
        # A checkpoint is saved between two logged steps, and the run continues from it.
        with contextlib.suppress(Killed):
            pretrain(config_of("run"), token_step, [Killer(4)])
        pretrain(config_of("run", resume=True), token_step, [flops])
        pretrain(config_of("means"), mean_step)
        with a_run(config_of("own loop"), token_step) as run:
            data = run.parts.data.training(0)
            results = [
                one_step(run, data_iterator=data, reducer=run.parts.reducer) for _ in range(2)
            ]
            silent = one_step(run, data_iterator=data)
            run.parts.checkpointer.save()
            counters = run.parts.state.train_state
            own = counters.consumed_tokens, counters.floating_point_operations_so_far
            return [[result.tokens for result in results], silent.tokens, flops.number, own]

    def counted(step: int) -> int:
        """Tokens of a step: sample i has 1 + i % 3."""
        drawn = [drawn_sample(own_run(tmp_path), 24, 8 * step + i) for i in range(8)]
        return sum(1 + index % 3 for index in drawn)

    steps = [counted(step) for step in range(5)]
    own = sum(steps[:2]) + 8
    wanted = [steps[:2], 8, 10.0 * sum(steps), (own, 10.0 * own)]
    assert run_ranks(2, body, timeout=120) == [wanted] * 2
    found = [(row["step"], row["consumed_tokens"]) for row in rows(tmp_path / "run")]
    assert found == [(2, sum(steps[:2])), (4, sum(steps[:4])), (5, sum(steps))]
    ratios = {
        row["step"]: row["tokens_per_s"] * row["step_time_s"] for row in rows(tmp_path / "run")
    }
    # The row of step 4 is that of the continued run, whose first interval is step 4 alone.
    assert ratios == pytest.approx({2: sum(steps[:2]) / 2, 4: steps[3], 5: steps[4]})
    assert series(tmp_path / "means", "consumed_tokens") == [16, 32, 40]


class Overflows:
    """An optimizer that skips its step, as the one for fp16 does after an overflow."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> tuple[bool, None, None]:
        return False, None, None


def test_a_skipped_step_counts_its_samples_and_leaves_the_rate_alone(
    tmp_path: Path,
) -> None:
    def body() -> list[Any]:
        with a_run(own_run(tmp_path / "run"), token_step) as run:
            before = parameters_of(run.parts.model)
            one_step(run)
            rates = [one_step(run, optimizer=Overflows(run.parts.optimizer)).learning_rate]
            unchanged = parameters_of(run.parts.model)
            result = one_step(run, optimizer=Overflows(run.parts.optimizer))
            rates.append(result.learning_rate)
            for name, value in parameters_of(run.parts.model).items():
                assert torch.equal(value, unchanged[name]), name
            assert before.keys() == unchanged.keys()
            counters = run.parts.state.train_state
            return [
                rates,
                (result.skipped, result.grad_norm),
                (counters.step, counters.consumed_train_samples, counters.skipped_train_samples),
            ]

    ((rates, result, counters),) = run_ranks(1, body, timeout=120)
    assert rates[0] == rates[1] == pytest.approx(0.025)
    assert result == (True, None)
    assert counters == (3, 24, 16)


@pytest.mark.parametrize("calls", [0, 2])
def test_gradients_that_are_not_finalized_exactly_once_are_an_error(
    tmp_path: Path, calls: int
) -> None:
    class Finalizer(GradientFinalizer):
        @override
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            self.calls += calls

    def body() -> str:
        with a_run(own_run(tmp_path / "run"), token_step) as run:
            get_model_config(run.parts.model[0]).finalize_model_grads_func = Finalizer()
            with pytest.raises(RuntimeError) as error:
                one_step(run)
            return str(error.value)

    assert f"finalized the gradients {calls} times" in run_ranks(1, body, timeout=120)[0]


def test_a_model_without_the_hooks_is_rejected(tmp_path: Path) -> None:
    def body() -> None:
        with a_run(own_run(tmp_path / "run"), token_step) as run:
            get_model_config(run.parts.model[0]).finalize_model_grads_func = None
            with pytest.raises(ValueError, match="attach_hooks"):
                one_step(run)

    run_ranks(1, body, timeout=120)


def test_a_nan_is_reported_at_the_next_logged_step_by_its_step_and_microbatch(
    tmp_path: Path,
) -> None:
    def body() -> tuple[str, list[str]]:
        config = own_run(tmp_path / "run")
        config.train = TrainConfig(train_iters=9, global_batch_size=8, micro_batch_size=2)
        config.logger.log_interval = 4
        seen = []

        def poisoned(data_iterator: Any, model: Any) -> Any:
            output, loss_function = token_step(data_iterator, model)
            seen.append(output)
            # Two microbatches a step on each of two ranks: the second one of step 6.
            bad = len(seen) == 12 and dist.get_rank() == 1
            return output, (lambda out: loss_function(out * float("nan") if bad else out))

        with pytest.raises(FloatingPointError) as error:
            pretrain(config, poisoned)
        return str(error.value), error.value.__notes__

    for rank, (message, notes) in enumerate(run_ranks(2, body, timeout=120)):
        assert "rank 1: nan at step 6, microbatch 1" in message
        # A slower rank may learn of the other's failure first.
        assert notes[-1] == f"rank {rank}, in step 8"
    assert [row["step"] for row in rows(tmp_path / "run")] == [4]


def test_no_checkpoint_follows_an_unread_nan(tmp_path: Path) -> None:
    def body() -> None:
        config = own_run(tmp_path / "run")
        config.checkpoint.save_interval = 2
        config.logger.log_interval = 5
        seen = []

        def poisoned(data_iterator: Any, model: Any) -> Any:
            output, loss_function = token_step(data_iterator, model)
            seen.append(output)
            bad = len(seen) == 4 * 3 + 1  # the first of four microbatches of step 4
            return output, (lambda out: loss_function(out * float("nan") if bad else out))

        with pytest.raises(FloatingPointError, match="rank 0: nan at step 4, microbatch 0"):
            pretrain(config, poisoned)

    run_ranks(1, body, timeout=120)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "step-0000002"}


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_run_of_any_length_has_a_valid_warm_up(
    tmp_path: Path, iterations: int, fraction: float
) -> None:
    def body(batch: int) -> None:
        config = own_run(tmp_path / f"{batch}")
        config.train = TrainConfig(train_iters=iterations, global_batch_size=batch)
        config.scheduler.lr_warmup_fraction = fraction
        pretrain(config, token_step)

    def both() -> None:
        body(1)
        body(8)

    run_ranks(1, both, timeout=120)
    for batch in (1, 8):
        rates = series(tmp_path / f"{batch}", "learning_rate")
        assert len(rates) == iterations
        assert all(0 <= rate <= 0.05 for rate in rates)


def test_a_module_that_a_callback_sets_to_eval_mode_stays_in_it(tmp_path: Path) -> None:
    class DropoutOff:
        def on_train_start(self, context: Any) -> None:
            context.model[0].module.module.dropout.eval()

        def on_step_end(self, context: Any, result: Any) -> None:
            module = context.model[0].module.module
            assert module.training
            assert not module.dropout.training

    def body() -> None:
        config = own_run(tmp_path / "run", model=OwnModel(dropout=0.9))
        config.dataset = OwnData(validation=8)
        config.validation.eval_interval = 1
        pretrain(config, token_step, [DropoutOff()])

    run_ranks(1, body, timeout=120)
    wanted = plain_torch(own_run(tmp_path), pattern=2, steps=5)
    assert series(tmp_path / "run", "error") == pytest.approx(wanted.losses, rel=2e-6)
