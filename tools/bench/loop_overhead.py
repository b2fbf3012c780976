"""Measure the overhead of our loop over a bare one, on the CPU with one thread.

    python tools/bench/loop_overhead.py [--blocks 40] [--steps 5] [section.field=value ...]

`bridge.training.train.train` runs once, with all that it does between steps. After every few of
its steps a callback lets the bare loop take as many on a model, an optimizer, a schedule and a data
iterator of its own, made by the same functions of the same recipe. Each block of ours is divided by
the mean of the bare blocks before and after it, which cancels what else the machine is doing; the
last line has the median of these ratios.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, override

import torch

from bridge.gpt import recipes
from bridge.training.callbacks import Callback, CallbackContext, Callbacks
from bridge.training.config import ConfigContainer, apply_overrides, resolve
from bridge.training.data.run_data import RunData
from bridge.training.gpt_step import forward_step
from bridge.training.model.building import build_model
from bridge.training.optimizer.building import build_optimizer
from bridge.training.optimizer.scheduler import build_scheduler
from bridge.training.ranks.groups import Ranks, ranks_of
from bridge.training.reporting.progress import Progress
from bridge.training.setup import set_up
from bridge.training.train import train


def bare_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses, [batch, sequence], where the mask is one; count them."""
    mask = loss_mask.view(-1).float()
    total = (losses.view(-1).float() * mask).sum()
    count = mask.sum()
    return total, count.int(), {"lm loss": torch.stack((total.detach(), count))}


def bare_forward_step(
    data_iterator: Iterator[Mapping[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """Run the model on the next microbatch."""
    sample = next(data_iterator)
    losses = model(
        sample["tokens"],
        sample["position_ids"],
        None,
        labels=sample["labels"],
        loss_mask=sample["loss_mask"],
    )
    return losses, partial(bare_loss, sample["loss_mask"])


class BareLoop:
    """A script's loop around megatron-core's schedule: no logging, no callbacks, no checks."""

    def __init__(self, config: ConfigContainer, ranks: Ranks, data: RunData) -> None:
        """Build a second model with its optimizer, schedule and data iterator."""
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.utils import get_model_config

        self.model: list[Any] = build_model(config, ranks)
        self.optimizer: Any = build_optimizer(config, self.model, ranks.model)
        self.scheduler = build_scheduler(config, self.optimizer, data.schedule_samples)
        self.data_iterator = data.training(0)[0]
        self.samples = config.train.global_batch_size
        model_config = get_model_config(self.model[0])
        model_config.grad_scale_func = self.optimizer.scale_loss
        model_config.finalize_model_grads_func = finalize_model_grads
        if config.ddp.overlap_grad_reduce:
            model_config.no_sync_func = self.model[0].no_sync
        self.schedule = partial(
            get_forward_backward_func(pp_size=1, vp_size=None),
            forward_step_func=bare_forward_step,
            data_iterator=self.data_iterator,
            model=self.model[0],
            num_microbatches=self.samples // config.train.micro_batch_size,
            seq_length=config.model.seq_length,  # type: ignore[attr-defined]  # it is a GPT
            micro_batch_size=config.train.micro_batch_size,
            forward_only=False,
            pg_collection=ranks.pg_collection,
        )

    def step(self) -> None:
        """Take one step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.schedule()
        succeeded, _, _ = self.optimizer.step()
        if succeeded:
            self.scheduler.step(increment=self.samples)


class Alternate(Callback):
    """Gives the bare loop a block of steps before every block of ours, and times both."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bare_loop: BareLoop | None = None
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._resumed: float | None = None

    @override
    def on_step_start(self, context: CallbackContext) -> None:
        """Between two blocks of ours, run and time one of the bare loop's."""
        if context.state.train_state.step % self.steps:
            return
        start = time.perf_counter()
        if self._resumed is not None:
            self.ours.append((start - self._resumed) / self.steps)
        assert self.bare_loop is not None
        start = time.perf_counter()
        for _ in range(self.steps):
            self.bare_loop.step()
        self._resumed = time.perf_counter()
        self.bare.append((self._resumed - start) / self.steps)

    def ratios(self, warmup: int) -> list[float]:
        """Return ours over bare, block by block, without the first `warmup` blocks."""
        brackets = [(before + after) / 2 for before, after in pairwise(self.bare)]
        return [ours / bare for ours, bare in zip(self.ours, brackets, strict=True)][warmup:]


def measure(config: ConfigContainer, steps: int) -> Alternate:
    """Train as configured, alternating with the bare loop every `steps` steps."""
    alternate = Alternate(steps)
    with (
        ranks_of(config, "cpu") as ranks,
        set_up(config, ranks, forward_step, Callbacks([alternate]), Progress(enabled=False)) as run,
    ):
        alternate.bare_loop = BareLoop(config, ranks, run.parts.data)
        with run.callbacks.training(run.context):
            train(run)
    return alternate


def main() -> None:
    """Measure, and print the ratio last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5, help="steps of a block")
    parser.add_argument("--warmup", type=int, default=3, help="blocks left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "dataset.mock=true",
            # One more step than the blocks hold: a block of ours ends where the next step begins.
            f"train.train_iters={(options.warmup + options.blocks) * options.steps + 1}",
            "train.num_workers=0",
            "validation.eval_iters=0",
            "checkpoint.save_at_end=false",
            f"checkpoint.run_dir={folder}/run",
            *options.overrides,
        ]
        config = apply_overrides(recipes.gpt_tiny(), overrides)
        alternate = measure(resolve(config, device="cpu", world_size=1), options.steps)
    ratios = alternate.ratios(options.warmup)
    ours, bare = (
        1000 * statistics.median(times[options.warmup :])
        for times in (alternate.ours, alternate.bare)
    )
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"{len(ratios)} blocks of {options.steps} steps, median ms per step:")
    print(f"  our loop   {ours:.3f}\n  bare loop  {bare:.3f}")
    print(f"  quartiles of the ratio {low:.4f} to {high:.4f}")
    print(f"overhead_ratio {statistics.median(ratios):.4f}")


if __name__ == "__main__":
    main()
