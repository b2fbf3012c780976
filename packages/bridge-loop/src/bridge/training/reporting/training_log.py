"""The record of a logged step: to the metric loggers once and to the terminal once."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch

from bridge.training.megatron_patches import slowest_times
from bridge.training.reporting.progress import Progress
from bridge.training.reporting.throughput import Throughput, peak_bf16_flops
from bridge.training.state import GlobalState
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.step.train_step import StepResult

type Record = dict[str, float | None]

# Every timer that megatron-core's schedules, gradient reduction and optimizers may start. Reading
# them is a collective in which all ranks must name the same ones, not those that they started.
_TIMERS = [
    "forward-backward",
    "forward-compute",
    "backward-compute",
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-forward-recv",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
    "all-grads-sync",
    "params-all-gather",
    "embedding-grads-all-reduce",
    "conditional-embedder-grads-all-reduce",
    "non-tensor-parallel-grads-all-reduce",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-count-zeros",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
]


class TrainingLog:
    """Collects steps until one is logged, and writes its record.

    A record has, in this order: ``consumed_samples`` and ``consumed_tokens`` of the whole run; each
    metric by its name, as logger.average says; ``learning_rate`` and ``grad_norm`` of the newest
    step (the norm None if it was skipped or nothing clips); ``loss_scale`` (fp16 only);
    ``skipped_steps`` since the record before; ``step_time_s``, the mean over the steps since then;
    ``tokens_per_s``, ``samples_per_s`` and ``NAME_per_s`` of other items of the data (images);
    ``mfu`` where the model's FLOPs and the device's peak are known; ``memory_gb`` on a GPU, rank
    0's highest allocation so far in 1e9 bytes; and, with logger.timing_log_level, megatron-core's
    timers as ``NAME-time``: seconds a step, on the slowest rank.

    Steps are timed on the host, without a host-device sync but that of reading a record's metrics.
    """

    def __init__(
        self,
        *,
        state: GlobalState,
        progress: Progress,
        total_steps: int,
        device: Literal["cuda", "cpu"],
        world_size: int,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        """Start the clock of the first step.

        Args:
            state: The run's state, whose loggers are open.
            progress: Shows the records.
            total_steps: The run's last step.
            device: Where the run computes.
            world_size: Number of ranks.
            loss_scale: Reads the optimizer's loss scale, where it has one (fp16).
        """
        self._state = state
        self._progress = progress
        self._total_steps = total_steps
        self._on_gpu = device == "cuda"
        self._loss_scale = loss_scale
        self._throughput = Throughput(
            flops_per_token=state.token_counter.flops_per_token,
            peak_flops=peak_bf16_flops(torch.cuda.get_device_name()) if self._on_gpu else None,
            world_size=world_size,
        )
        self._loggers = state.metric_loggers
        self._newest: StepResult | None = None
        self._start_interval()

    def add_step(self, result: "StepResult") -> None:
        """Add a step that was done to the interval, without waiting for the device."""
        self._newest = result
        self._steps += 1
        self._samples += result.samples
        self._skipped += result.skipped
        self._progress.tick(self._state.train_state.step, self._total_steps)

    def write(
        self,
        metrics: Mapping[str, float | None],
        counts: Mapping[str, int],
        *,
        on_record: Callable[[dict[str, float | None]], None] | None = None,
    ) -> Record:
        """Write the record of the newest step; on every rank, as timers are read over all.

        Args:
            metrics: The step's metrics, already read from the device.
            counts: Tokens of the interval over all ranks, and the other items that the data counts
                (`TokenCounter.take_interval`).
            on_record: Gets the record before it is written, and may add to it.

        Returns:
            The record as it was written, with its "step".

        Raises:
            UsageError: A metric has the name of one of the loop's own values.
        """
        if self._newest is None:
            raise RuntimeError("there is no step to write a record for: call add_step first")
        seconds = time.perf_counter() - self._started - self._paused
        counters = self._state.train_state
        before: Record = {
            "consumed_samples": counters.consumed_train_samples,
            "consumed_tokens": counters.consumed_tokens,
        }
        after = self._own_values(self._newest, counts, seconds)
        if taken := sorted(metrics.keys() & {"step", *before, *after}):
            raise UsageError(
                f"metric {taken[0]!r} has the name of a value that the training log writes "
                "itself: give it another name in the loss function"
            )
        record: Record = {**before, **metrics, **after}
        if on_record is not None:
            on_record(record)
        self._loggers.log(record, counters.step)
        self._progress.step(counters.step, self._total_steps, record)
        self._start_interval()
        return {"step": counters.step, **record}

    def write_evaluation(
        self, name: str, metrics: Mapping[str, float | None], samples: int
    ) -> None:
        """Write the metrics of an evaluation as ``NAME/METRIC``.

        Args:
            name: "validation" or "test".
            metrics: The metrics, reduced over all ranks.
            samples: Samples that were evaluated, over all ranks.
        """
        step = self._state.train_state.step
        record: Record = {f"{name}/{key}": value for key, value in metrics.items()}
        self._loggers.log(record, step)
        self._progress.evaluation(name, step, {**metrics, "samples": samples})

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the block from the steps' time."""
        if self._on_gpu:  # Steps that the device still computes belong to the time before.
            torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def _own_values(
        self, result: "StepResult", counts: Mapping[str, int], seconds: float
    ) -> Record:
        grad_norm = None if result.grad_norm is None else float(result.grad_norm)
        values: Record = {"learning_rate": result.learning_rate, "grad_norm": grad_norm}
        if result.zeros_in_grad is not None:
            values["num_zeros_in_grad"] = result.zeros_in_grad
        if self._loss_scale is not None:
            values["loss_scale"] = self._loss_scale()
        values["skipped_steps"] = self._skipped
        values["step_time_s"] = seconds / self._steps
        values |= self._throughput.rates(samples=self._samples, seconds=seconds, counts=counts)
        if self._on_gpu:
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self._state.cfg.logger.timing_log_level > 0:
            times = slowest_times(self._state.timers, _TIMERS, steps=self._steps)
            values |= {f"{name}-time": seconds for name, seconds in times.items()}
        return values

    def _start_interval(self) -> None:
        self._started = time.perf_counter()
        self._paused = 0.0
        self._steps = self._samples = self._skipped = 0
