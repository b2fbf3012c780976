"""Anomalies of the loss: NaN, Inf and spikes, and the actions on them.

`train.nan_action` and `train.spike_action` choose between

    raise          an error on every rank, at the next logged step, evaluation or checkpoint
    log            a warning there; the step was taken, so the loss is in the weights
    raise_at_once  the error before the optimizer's step
    skip           the optimizer's step is skipped on every rank; the warning comes as with log

An evaluation has no optimizer's step: raise_at_once is raise there, and skip is log.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn import functional

from bridge.training.ranks.collectives import from_every_rank

if TYPE_CHECKING:
    from bridge.training.config.sections import AnomalyAction, TrainConfig

WINDOW = 20
"""Steps in the mean of the losses, and steps before the first possible spike."""


class LossWatch:
    """Every microbatch's loss, kept on the device until it is checked for anomalies.

    A training microbatch is a spike if its loss per token is finite and above
    ``train.spike_factor`` times the mean of this rank's earlier steps, where that mean is positive
    and at least `WINDOW` steps are in it. A step's x is the average over its microbatches that have
    tokens and are neither a spike nor NaN or infinite; a step without such adds nothing. The k-th
    that adds something makes ``mean += (x - mean) / min(k, WINDOW)``: the average of the first
    `WINDOW` steps, and an exponential one with the weight 1 / `WINDOW` for the newest after them.

    Only `check`, `should_skip_step` and `state_dict` are host-device syncs.
    """

    _FOLD_AT = 256

    def __init__(self) -> None:
        # Positions count the losses since the start of the run; a mark names those after it.
        self._marks: list[tuple[int, str]] = [(0, "the first step")]
        self._first = 0
        self._seen = 0
        self._inspected = 0
        self._recent: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        # float64 [3, n]: loss, the mean that it was compared with, and 1 if it is a spike. The loss
        # is per token where spikes are looked for; NaN and Inf are the same either way.
        self._blocks: list[torch.Tensor] = []
        self._spike_factor: float | None = None
        self._saved_mean = (0.0, 0.0)
        # float64 [2] each: the mean and the steps in it; this step's sum and number of losses.
        self._mean: torch.Tensor | None = None
        self._of_step: torch.Tensor | None = None

    def start(self, where: str, *, spike_factor: float | None = None) -> None:
        """Start a step or an evaluation, to which the next microbatches belong.

        Args:
            where: Its name in messages: "step 7", "validation at step 7".
            spike_factor: Look for spikes, and take the losses into the mean at `end_step`.
        """
        self._fold()
        self._spike_factor = spike_factor
        self._of_step = None
        if self._marks[-1][0] == self._seen:
            self._marks.pop()
        self._marks.append((self._seen, where))

    def add(self, loss: torch.Tensor, count: torch.Tensor | None = None) -> None:
        """Add one microbatch: detached scalars that are not changed later.

        Args:
            loss: Its loss; a sum if there is a count, else a mean.
            count: Tokens in the loss.
        """
        self._recent.append((loss, count))
        self._seen += 1
        if len(self._recent) == self._FOLD_AT:
            self._fold()

    def end_step(self) -> None:
        """Take the losses since `start` into the mean."""
        self._fold()
        if self._of_step is None or self._mean is None:
            return
        mean, steps = self._mean
        total, number = self._of_step
        steps = steps + (number > 0)
        change = (total / number - mean) / steps.clamp(min=1, max=WINDOW)
        self._mean = torch.stack((mean + torch.where(number > 0, change, 0.0), steps))
        self._of_step = None

    def anomaly_flag(self) -> torch.Tensor | None:
        """Return 1 if there was an anomaly since the last check, else 0, on the device.

        None on a rank that saw no loss. `MetricReducer.reduce` reduces it with the metrics, and
        `ReducedMetrics.has_anomaly` is then the same on every rank.
        """
        losses = self._all_losses()
        self._inspected = self._seen
        return None if losses is None else _anomalies(losses).any().to(torch.float64)

    def clear(self) -> None:
        """Forget the losses of the last `anomaly_flag`, after it was 0 on every rank."""
        losses = self._all_losses()
        later = self._seen - self._inspected
        self._blocks = [losses[:, -later:]] if losses is not None and later else []
        self._first = self._inspected
        current = max(index for index, mark in enumerate(self._marks) if mark[0] <= self._first)
        del self._marks[:current]

    def check(self, train: "TrainConfig", group: dist.ProcessGroup | None = None) -> list[str]:
        """Check the losses since the last check on all ranks of the group, and forget them.

        A collective and a host-device sync.

        Returns:
            The warnings of log and skip, equal on every rank.

        Raises:
            FloatingPointError: An anomaly's action is raise or raise_at_once; on every rank. The
                message has each rank's first step and microbatch.
        """
        actions = actions_of(train)
        losses = self._all_losses() if any(actions) else None
        mine = (None, None) if losses is None else self._describe(losses.tolist())
        self._inspected = self._seen
        self.clear()
        if not any(actions):
            return []
        errors: list[str] = []
        warnings: list[str] = []
        headlines = (
            f"The loss is not finite (train.nan_action={train.nan_action}).",
            f"The loss is above train.spike_factor={train.spike_factor} times its recent mean "
            f"(train.spike_action={train.spike_action}).",
        )
        by_kind = zip(*from_every_rank(mine, group), strict=True)
        for action, headline, found in zip(actions, headlines, by_kind, strict=True):
            reports = [f"rank {rank}: {line}" for rank, line in enumerate(found) if line]
            if action is not None and reports:
                more = f" (and {len(reports) - 8} more ranks)" if len(reports) > 8 else ""
                message = f"{headline} {'; '.join(reports[:8])}{more}"
                (errors if action.startswith("raise") else warnings).append(message)
        if errors:
            error = FloatingPointError(" ".join(errors))
            for warning in warnings:
                error.add_note(warning)
            raise error
        return warnings

    def should_skip_step(self, train: "TrainConfig") -> bool:
        """Whether all ranks must skip the optimizer's step for the losses since `start`.

        With raise_at_once or skip it is a collective over all ranks and a host-device sync.

        Raises:
            FloatingPointError: An anomaly's action is raise_at_once; on every rank.
        """
        actions = actions_of(train)
        if not {"raise_at_once", "skip"} & {*actions}:
            return False
        # NaN or Inf, spike, and any anomaly that is not reported yet, of this step or before it.
        flags = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
        losses = self._all_losses()
        if losses is not None:
            anomalies = _anomalies(losses)
            flags[:2] = anomalies[:, self._marks[-1][0] - self._first :].any(dim=1)
            flags[2] = anomalies.any()
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        *found, unreported = flags.tolist()
        if not unreported:
            self._inspected = self._seen
            self.clear()
        due = {action for action, flag in zip(actions, found, strict=True) if flag}
        if "raise_at_once" in due:
            self.check(train)
        return "skip" in due

    def state_dict(self) -> dict[str, float]:
        """Return the mean that later losses are compared with, and the number of steps in it."""
        mean, steps = self._saved_mean if self._mean is None else self._mean.tolist()
        return {"mean": mean, "steps": steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the mean of `state`."""
        self._saved_mean = (state["mean"], state["steps"])
        self._mean = None

    def _fold(self) -> None:
        """Make a block of the recent losses, which all belong to one step or evaluation."""
        if not self._recent:
            return
        losses = torch.stack([loss for loss, _ in self._recent]).double()
        counts = [count for _, count in self._recent if count is not None]
        self._recent.clear()
        if self._spike_factor is None:
            block = functional.pad(losses[None], (0, 0, 0, 2))
        else:
            block = self._compare(losses, torch.stack(counts) if counts else None)
        self._blocks.append(block)
        if len(self._blocks) == self._FOLD_AT:
            self._all_losses()

    def _compare(self, losses: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
        """Return the block of losses that are compared with the mean, and add them to the step."""
        if self._mean is None:
            # Filled, as a copy from the host would be a host-device sync.
            self._mean = torch.stack([losses.new_full((), value) for value in self._saved_mean])
        if self._of_step is None:
            self._of_step = torch.zeros_like(self._mean)
        mean, steps = self._mean
        tokens = torch.ones_like(losses) if counts is None else counts
        losses = losses / tokens.clamp(min=1)
        finite = torch.isfinite(losses)
        has_mean = (steps >= WINDOW) & (mean > 0)
        spikes = has_mean & finite & (losses > self._spike_factor * mean)
        usual = finite & ~spikes & (tokens > 0)
        sums = torch.stack((torch.where(usual, losses, 0.0), usual)).sum(dim=1)
        self._of_step = self._of_step + sums
        return torch.stack((losses, mean.expand_as(losses), spikes))

    def _all_losses(self) -> torch.Tensor | None:
        self._fold()
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks, dim=1)]
        return self._blocks[0] if self._blocks else None

    def _describe(self, losses: list[list[float]]) -> tuple[str | None, str | None]:
        """Describe the first loss that is not finite and the first spike."""
        not_finite, spikes = [], []
        for position, (loss, mean, is_spike) in enumerate(zip(*losses, strict=True), self._first):
            if not math.isfinite(loss):
                not_finite.append((position, f"{loss}", ""))
            elif is_spike:
                spikes.append((position, f"{loss:.6g}", f", where the mean is {mean:.6g}"))
        return self._first_of(not_finite), self._first_of(spikes)

    def _first_of(self, found: list[tuple[int, str, str]]) -> str | None:
        if not found:
            return None
        position, loss, remark = found[0]
        start, where = max(mark for mark in self._marks if mark[0] <= position)
        later = f" (and {len(found) - 1} later)" if len(found) > 1 else ""
        return f"{loss} at {where}, microbatch {position - start}{remark}{later}"


def actions_of(train: "TrainConfig") -> "tuple[AnomalyAction | None, AnomalyAction | None]":
    """Return the actions on NaN or Inf and on a spike; None where they are not looked for."""
    return (
        train.nan_action if train.check_for_nan else None,
        train.spike_action if train.spike_factor is not None else None,
    )


def _anomalies(losses: torch.Tensor) -> torch.Tensor:
    """Return bool [2, n]: whether each loss is NaN or infinite, and whether it is a spike."""
    return torch.stack((~torch.isfinite(losses[0]), losses[2] > 0))
