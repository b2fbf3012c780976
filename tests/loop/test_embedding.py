"""Training inside a program with its own loop leaves nothing behind in its process."""

import gc
import itertools
import os
import random
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, override

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
from megatron.core.tensor_parallel import random as tracked
from torch.utils.data import default_collate

from bridge.training import cpu
from bridge.training.config import ConfigContainer
from bridge.training.run import TrainingParts
from bridge.training.setup import training_parts
from bridge.training.state import GlobalState
from bridge.training.train import StepResult, train_step
from plain_torch import plain_torch
from process_footprint import take_footprint
from ranks import run_ranks
from training_runs import OwnModel, OwnModule, Samples, own_run, parameters_of, token_step


def steps(parts: TrainingParts, number: int, data: Any = None) -> Iterator[StepResult]:
    """Train as a program with its own loop does."""
    data = data or parts.data.training(parts.state.train_state.consumed_train_samples)
    for _ in range(number):
        yield train_step(
            parts.forward_step,
            data,
            parts.model,
            parts.optimizer,
            parts.scheduler,
            parts.state,
            pg_collection=parts.ranks.pg_collection,
            reducer=parts.reducer,
        )


def train(config: ConfigContainer, number: int = 3) -> list[float | None]:
    """Return the losses of the first steps."""
    with training_parts(config, token_step) as parts:
        return [result.metrics["error"] for result in steps(parts, number)]


def config_of(width: int, **sections: Any) -> ConfigContainer:
    sections = {"model": OwnModel(width=width, dropout=0.25)} | sections
    return own_run("nowhere", **sections)


class Program:
    """A program around the run that owns the default process group and has used torch before."""

    def __init__(self) -> None:
        os.chdir(tempfile.mkdtemp())
        tempfile.tempdir = tempfile.mkdtemp()
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        # The modules that a first run imports, and the threads of a pool, stay.
        train(config_of(3), 1)
        self.before = take_footprint()

    def assert_untouched(self) -> None:
        assert self.before.changes_until(take_footprint()) == {}
        ones = torch.ones(())
        dist.all_reduce(ones)
        assert ones == dist.get_world_size()


@pytest.mark.parametrize("world_size", [1, 2])
def test_two_models_one_after_the_other_leave_nothing_behind(world_size: int) -> None:
    def body() -> Any:
        cpu.disable()
        program = Program()
        losses = []
        for width in (6, 9):
            losses.append(train(config_of(width)))
            program.assert_untouched()
        return losses

    def alone(width: int) -> Any:
        return train(config_of(width))

    found = run_ranks(world_size, body, timeout=120)
    for index, width in enumerate((6, 9)):
        fresh = run_ranks(world_size, alone, width, timeout=120)
        assert [losses[index] for losses in found] == fresh  # Bit for bit.
        assert len(set(fresh[0])) == 3


def test_a_forward_step_gets_the_tracker_that_the_program_has_opened(tmp_path: Path) -> None:
    def step(state: GlobalState, data_iterator: Any, model: Any) -> Any:
        writer = state.tensorboard_logger
        assert writer is not None
        writer.add_text("sample", "text", state.train_state.step)
        return token_step(data_iterator, model)

    def body() -> None:
        config = own_run(tmp_path / "run")
        config.logger.tensorboard = True
        with training_parts(config, step) as parts:
            with pytest.raises(RuntimeError, match=r"call state.open_loggers\(step\) first"):
                next(steps(parts, 1))
            assert not (tmp_path / "run").exists()
            parts.state.open_loggers(step=0)
            next(steps(parts, 1))

    run_ranks(1, body, timeout=120)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def fails_in(place: str) -> Callable[..., Any]:
    def failing(data_iterator: Iterator[Any], model: Any) -> Any:
        output, loss_function = token_step(data_iterator, model)
        if place == "forward step":
            raise ZeroDivisionError(place)

        def failing_loss(output: torch.Tensor) -> Any:
            raise ZeroDivisionError(place)

        return output, failing_loss if place == "loss function" else loss_function

    return failing


class BrokenModel(OwnModel):
    @override
    def build(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("model")


@pytest.mark.parametrize("place", ["model", "forward step", "loss function", "own loop"])
def test_a_failure_leaves_nothing_behind(place: str) -> None:
    def failing_run() -> None:
        model = BrokenModel() if place == "model" else OwnModel()
        with training_parts(own_run("nowhere", model=model), fails_in(place)) as parts:
            for _ in steps(parts, 2):
                raise ZeroDivisionError("own loop")

    def body() -> None:
        cpu.disable()
        program = Program()
        with pytest.raises(ZeroDivisionError, match=place):
            failing_run()
        program.assert_untouched()

    run_ranks(2, body, timeout=120)


def test_what_the_program_has_of_megatron_core_stays_its_own() -> None:
    """Groups, random streams, number of microbatches, rerun machine."""

    def body() -> Any:
        program = Program()
        parallel_state.initialize_model_parallel()
        tracked.model_parallel_cuda_manual_seed(11)
        num_microbatches_calculator.init_num_microbatches_calculator(
            rank=1, global_batch_size=12, micro_batch_size=3, data_parallel_size=2
        )
        rerun_state_machine.initialize_rerun_state_machine()
        streams = tracked.get_cuda_rng_tracker().get_states()
        copies = {name: state.clone() for name, state in streams.items()}
        program.before = take_footprint()
        losses = train(config_of(6))
        program.assert_untouched()
        assert num_microbatches_calculator.get_num_microbatches() == 2
        streams = tracked.get_cuda_rng_tracker().get_states()
        assert streams.keys() == copies.keys()
        assert all(torch.equal(streams[name], copies[name]) for name in copies)
        for group in (
            parallel_state.get_data_parallel_group(),
            parallel_state.get_model_parallel_group(),
        ):
            ones = torch.ones(())
            dist.all_reduce(ones, group=group)
            assert ones == group.size()
        return losses

    ours = run_ranks(2, lambda: train(config_of(6)), timeout=120)
    assert run_ranks(2, body, timeout=120) == ours


def test_two_models_may_be_trained_in_turn() -> None:
    """An actor and its critic are. Their dropout would draw from one stream."""

    def config(width: int) -> ConfigContainer:
        return config_of(width, model=OwnModel(width=width))

    def body() -> Any:
        with training_parts(config(6), token_step) as outer:
            losses: list[list[Any]] = [[], []]
            with training_parts(config(9), token_step) as inner:
                for one, other in zip(steps(outer, 3), steps(inner, 3), strict=True):
                    losses[0].append(one.metrics["error"])
                    losses[1].append(other.metrics["error"])
            losses[0] += [result.metrics["error"] for result in steps(outer, 1)]
        return losses

    first, second = run_ranks(2, body, timeout=120)
    assert (
        first
        == second
        == [
            run_ranks(2, lambda: train(config(6), 4), timeout=120)[0],
            run_ranks(2, lambda: train(config(9), 3), timeout=120)[0],
        ]
    )


def test_signals_are_the_programs_own_while_it_trains() -> None:
    def body() -> None:
        received: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        with training_parts(config_of(6), token_step) as parts:
            for _ in steps(parts, 1):
                os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]

    run_ranks(1, body, timeout=120)


def test_the_trained_model_is_complete_and_can_be_used_after_the_run() -> None:
    """Parameters are gathered during the next step's forward pass, if there is one."""

    def body() -> Any:
        config = own_run("nowhere")
        assert config.ddp.overlap_param_gather
        with training_parts(config, token_step) as parts:
            list(steps(parts, 5))
        module: Any = parts.model[0].module
        module(torch.ones(3, 4)).sum().backward()
        return parameters_of(parts.model)

    wanted = plain_torch(own_run("nowhere"), pattern=2, steps=5).parameters
    for parameters in run_ranks(2, body, timeout=120):
        for name, value in wanted.items():
            torch.testing.assert_close(parameters[name], value, rtol=2e-5, atol=2e-6)


def test_the_memory_of_a_model_is_free_for_the_next_one() -> None:
    def body() -> None:
        gc.disable()  # The collector does not know the memory of a device and would run too late.

        def one_model() -> Any:
            with training_parts(config_of(6), token_step) as parts:
                list(steps(parts, 1))
            return [weakref.ref(parts.model[0]), weakref.ref(parts.optimizer)]

        last = one_model()
        seen: list[Any] = []

        class Model(OwnModel):
            @override
            def build(self, *arguments: Any, **named: Any) -> torch.nn.Module:
                seen.extend(reference() for reference in last)
                return super().build(*arguments, **named)

        with training_parts(own_run("nowhere", model=Model()), token_step):
            assert seen == [None, None]

    run_ranks(1, body, timeout=120)


def test_a_checkpoint_continues_a_users_loop_bit_for_bit(tmp_path: Path) -> None:
    def body() -> None:
        config = config_of(6)
        config.checkpoint.run_dir = str(tmp_path / "run")
        with training_parts(config, token_step) as parts:
            losses = [result.metrics["error"] for result in steps(parts, 3)]
            assert not (tmp_path / "run").exists()
            dist.barrier()
            parts.checkpointer.save()
            losses += [result.metrics["error"] for result in steps(parts, 2)]
            dist.barrier()
        config.checkpoint.resume = True
        with training_parts(config, token_step) as parts:
            assert parts.restored_from == tmp_path / "run" / "checkpoints" / "step-0000003"
            assert parts.state.train_state.step == 3
            assert [result.metrics["error"] for result in steps(parts, 2)] == losses[3:]

    run_ranks(2, body, timeout=120)


def test_weights_are_saved_unsharded_and_another_run_can_start_from_them(tmp_path: Path) -> None:
    def body() -> None:
        config = config_of(6)
        config.checkpoint.run_dir = str(tmp_path / "run")
        with training_parts(config, token_step) as parts:
            list(steps(parts, 3))
            parts.checkpointer.save()
        trained = parameters_of(parts.model)
        config.checkpoint.run_dir = str(tmp_path / "other")
        config.checkpoint.pretrained_checkpoint = str(tmp_path / "run")
        with training_parts(config, token_step) as parts:
            assert parts.state.train_state.step == 0
            for name, value in parameters_of(parts.model).items():
                assert torch.equal(value, trained[name]), name

    run_ranks(2, body, timeout=120)


def test_the_data_may_be_the_programs_own() -> None:
    def losses() -> list[float | None]:
        with training_parts(own_run("nowhere"), token_step) as parts:
            # Four microbatches of two samples, from anywhere.
            data = [Samples(8)[index] for index in (5, 1, 2, 7, 0, 3, 3, 6)]
            pairs = [default_collate(data[i : i + 2]) for i in range(0, 8, 2)]
            results = steps(parts, 2, [itertools.cycle(pairs)])
            return [result.metrics["error"] for result in results]

    def by_hand() -> float:
        torch.manual_seed(7)
        module = OwnModule(6, 0.0)
        batch = default_collate([Samples(8)[index] for index in (5, 1, 2, 7, 0, 3, 3, 6)])
        errors = (module(batch["x"]) - batch["y"]) ** 2
        return float((errors * batch["mask"]).sum().detach() / batch["mask"].sum())

    first, second = run_ranks(1, losses, timeout=120)[0]
    assert first == pytest.approx(by_hand(), rel=1e-6)
    # The first step of the warm-up has a rate of 0.
    assert second == pytest.approx(first, rel=1e-6)
