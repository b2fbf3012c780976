"""The losses of one's own in bridge-loop's README train what it says, whatever the layout."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig, TrainConfig
from bridge.training.pretrain import pretrain
from ranks import run_ranks
from readmes import README, ROOT, code
from training_runs import rows

LOOP = ROOT / "packages" / "bridge-loop" / "README.md"
BATCH, MICRO, SEED = 16, 4, 1234
STEPS = 3

type Example = dict[str, Any]
type Sums = Mapping[str, torch.Tensor]


def example(title: str) -> Example:
    """Return what an example defines, with the module and the data of the script."""
    script = code(README, "own_model.py").partition("\nif __name__")[0]
    loss = code(LOOP, title)
    assert len([line for line in loss.splitlines() if line.strip()]) <= 25
    found: Example = {"__name__": "example"}
    exec(script, found)  # the README is ours
    exec(loss, found)
    return found


class Gradients:
    """Keeps each step's parameters and final gradients, and the batches' order."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def on_before_optimizer_step(self, context: Any) -> None:
        parameters = list(context.model[0].parameters())
        self.steps.append(
            ([p.detach().clone() for p in parameters], [p.main_grad.clone() for p in parameters])
        )


def train(folder: Path, title: str, ranks: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """Train an example; return parameters and gradients of each step, and the rows."""

    def body() -> Any:
        found = example(title)
        data = found["Pieces"]() if "Pieces" in found else found["Sine"]()
        config = ConfigContainer(model=found["Perceptron"](width=8), dataset=data)
        config.train = TrainConfig(
            train_iters=STEPS, micro_batch_size=MICRO, global_batch_size=BATCH
        )
        config.logger = LoggerConfig(log_interval=1, tensorboard=False)
        config.checkpoint = CheckpointConfig(run_dir=str(folder / f"{ranks}"), save_at_end=False)
        config.optimizer.lr = 1e-2
        gradients = Gradients()
        pretrain(config, found["forward_step"], [gradients])
        return gradients.steps

    steps = run_ranks(ranks, body, process_group=False)[0]
    return steps, rows(folder / f"{ranks}")


def microbatches(title: str, step: int) -> list[Any]:
    """Return the samples of a step's microbatches, in the order that the seed gives."""
    found = example(title)
    if "Pieces" in found:
        samples = found["Pieces"]().build(None).train
        make: Callable[[Any], Any] = found["collate"]
    else:
        samples = found["Sine"]().build(None)[0]
        make = torch.utils.data.default_collate
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SEED))
    drawn = [samples[index] for index in order[step * BATCH : (step + 1) * BATCH].tolist()]
    return [make(drawn[first : first + MICRO]) for first in range(0, BATCH, MICRO)]


def network(parameters: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    first, first_bias, second, second_bias = parameters
    return torch.tanh(x @ first.T + first_bias) @ second.T + second_bias


def regularizer(parameters: list[torch.Tensor], batch: list[Any], step: int) -> Any:
    errors = torch.cat([(network(parameters, x) - y) ** 2 for x, y in batch])
    penalty = sum((p**2).sum() for p in parameters)
    return errors.mean() + 0.01 * penalty, {"error": errors.mean(), "penalty": penalty}


def two_tasks(parameters: list[torch.Tensor], batch: list[Any], step: int) -> Any:
    objective: Any = 0.0
    errors, near = [], []
    for x, y in batch:
        error, is_near = (network(parameters, x) - y) ** 2, x.abs() < 1
        part = error[is_near].mean() if is_near.any() else 0.0
        objective = objective + (error.mean() + 0.5 * part) / len(batch)
        errors.append(error.flatten())
        near.append(error[is_near])
    metrics = {"error": torch.cat(errors).mean(), "error near 0": torch.cat(near).mean()}
    return objective, metrics


def extra_metric(parameters: list[torch.Tensor], batch: list[Any], step: int) -> Any:
    errors = torch.cat([(network(parameters, x) - y) ** 2 for x, y in batch])
    misses = (errors > 0.1).sum()
    return errors.mean(), {"loss": errors.mean(), "worst": errors.max(), "misses": misses}


def custom_batch(parameters: list[torch.Tensor], batch: list[Any], step: int) -> Any:
    real = [part["x"][part["mask"] > 0] for part in batch]
    errors = torch.cat([(network(parameters, x) - x.sin()) ** 2 for x in real])
    return errors.mean(), {"lm loss": errors.mean()}


def functor(parameters: list[torch.Tensor], batch: list[Any], step: int) -> Any:
    miss = torch.cat([(network(parameters, x) - y).abs() for x, y in batch])
    weight = step / 20
    return ((1 - weight) * miss + weight * miss**2).mean(), {"weight": torch.tensor(weight)}


@pytest.mark.parametrize(
    ("title", "stated"),
    [
        ("a regularizer", regularizer),
        ("two tasks", two_tasks),
        ("an extra metric", extra_metric),
        ("a custom batch", custom_batch),
        ("a functor", functor),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_example_trains_the_objective_that_is_stated(
    tmp_path: Path, title: str, stated: Callable[..., Any], ranks: int
) -> None:
    steps, logged = train(tmp_path, title, ranks)
    assert len(steps) == len(logged) == STEPS
    for step, ((parameters, gradients), row) in enumerate(zip(steps, logged, strict=True)):
        weights = [p.clone().requires_grad_() for p in parameters]
        # On two ranks each takes every second microbatch: the same four microbatches.
        objective, metrics = stated(weights, microbatches(title, step), step)
        for expected, found in zip(torch.autograd.grad(objective, weights), gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        for name, value in metrics.items():
            assert row[name] == pytest.approx(value.item(), rel=1e-5), name


def test_a_users_loop_trains(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, loop = code(README, "own_model.py"), code(LOOP, "a loop of your own")
    configured, pretrains, _ = script.partition("    result = pretrain(")
    assert pretrains
    monkeypatch.setattr(sys, "argv", ["own_model.py", str(tmp_path / "own")])

    def body() -> None:
        exec(f"{configured}\n{loop}", {"__name__": "__main__"})

    run_ranks(1, body, process_group=False)
    losses = re.findall(r"'loss': ([\d.]+)", capfd.readouterr().out)
    assert len(losses) == 10
    assert float(losses[-1]) < float(losses[0])
