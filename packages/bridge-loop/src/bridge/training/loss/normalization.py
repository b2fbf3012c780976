"""The normalization of losses: the adapter from loss functions to megatron-core's schedules.

With l the loss that a microbatch m on data-parallel rank d and context-parallel rank c returns and
n its count, over M microbatches, D and C ranks, the objective is

    pattern 1, (l, metrics), either normalization:  sum_dmc l / (D * M * C)
    pattern 2, (l, n, metrics), token:              sum_dmc l / sum_dmc n
    pattern 2, (l, n, metrics), microbatch:         sum_dm (sum_c l / sum_c n) / (D * M)

Sums over tokens are divided once per step, with the gradients
(`bridge.training.model.hooks.GradientFinalizer`); the other quotients are taken here.

A comment at each conversion below says what the schedules and DDP do to a returned pair or triple,
from which follows what the adapter returns.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from bridge.training.loss.anomalies import LossWatch
from bridge.training.loss.metrics import (
    Metric,
    MicrobatchRecord,
    as_metric,
    mean,
    snapshot,
    token_mean,
)
from bridge.training.usage_error import UsageError

PATTERNS = "(loss, metrics) or (loss_sum, num_tokens, metrics)"


class LossAdapter:
    """The user's forward step as megatron-core's schedules call it, for one run.

    The schedules collect a `MicrobatchRecord` for each microbatch on the last pipeline stage;
    `bridge.training.loss_reduction.MetricReducer` reduces them to the metrics of a step.
    """

    def __init__(
        self,
        forward_step: Callable[..., Any],
        *,
        normalization: Literal["token", "microbatch"],
        padded_tokens: int,
        context_parallel_size: int = 1,
        context_parallel_group: dist.ProcessGroup | None = None,
        on_loss: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Wrap a forward step.

        Args:
            forward_step: ``(data_iterator, model) -> (output, loss_func)``; it is called with
                ``return_schedule_plan=True`` where megatron-core needs a plan.
            normalization: ``train.loss_normalization``. "token" belongs with
                ``calculate_per_token_loss=True`` in the model's config, "microbatch" with False.
            padded_tokens: Tokens of a microbatch on one rank, padding included: micro batch size *
                sequence length / context-parallel size.
            context_parallel_size: Ranks that share a microbatch's sequences.
            context_parallel_group: Those ranks; needed where there is more than one.
            on_loss: Called with each microbatch's loss (detached). It may be a host-device sync.
        """
        if padded_tokens < 1:
            raise UsageError(f"padded_tokens={padded_tokens}: must be at least 1; change it")
        if context_parallel_size > 1 and context_parallel_group is None:
            raise UsageError(
                f"context_parallel_size={context_parallel_size}: needs a group; give "
                "context_parallel_group"
            )
        self.normalization = normalization
        self.padded_tokens = padded_tokens
        self.watch = LossWatch()
        self._forward_step = forward_step
        self._context_parallel_size = context_parallel_size
        self._context_parallel_group = context_parallel_group
        self._on_loss = on_loss
        self._pattern: int | None = None
        self._left_to_watch = math.inf

    @contextlib.contextmanager
    def only_first(self, microbatches: int) -> Iterator[None]:
        """Watch only the losses of the first microbatches with a loss in this block.

        The loss functions of the others are called all the same, as they may contain collectives.
        """
        self._left_to_watch = microbatches
        try:
            yield
        finally:
            self._left_to_watch = math.inf

    def __call__(
        self,
        data_iterator: Iterator[Any] | None,
        model: torch.nn.Module,
        checkpoint_activations_microbatch: bool | None = None,
        *,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, Callable[..., Any]]:
        """Return the output of the user's forward step, and the adapted loss function."""
        if checkpoint_activations_microbatch is not None:
            result = self._forward_step(data_iterator, model, checkpoint_activations_microbatch)
        elif return_schedule_plan:
            result = self._forward_step(data_iterator, model, return_schedule_plan=True)
        else:
            result = self._forward_step(data_iterator, model)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise UsageError(
                f"forward step: returned {_describe(result)}; return (output, loss_func)"
            )
        output, loss_func = result

        def wrapped(output: Any, non_loss_data: bool = False) -> Any:
            if non_loss_data:
                return _collect(loss_func, output)
            if loss_func is None:
                raise UsageError(
                    "forward step: returned None for loss_func on the last pipeline stage; return "
                    f"a function of the output that returns {PATTERNS}"
                )
            return self._convert(loss_func(output), output)

        return output, wrapped

    def _convert(self, returned: Any, output: Any) -> tuple[Any, ...]:
        loss, count, metrics = self._parse(returned, output)
        # megatron-core rescales and frees the loss in place, so it must get a new tensor that is no
        # view. The product and the division below make one.
        loss = loss.reshape(()).float()
        optimized = loss.detach().clone()
        record = MicrobatchRecord(
            metrics=self._snapshots(metrics, optimized, count),
            loss=optimized,
            count=count,
        )
        if self._left_to_watch > 0:
            self._left_to_watch -= 1
            self.watch.add(optimized, count)
            if self._on_loss is not None:
                self._on_loss(optimized)
        if self.normalization == "token":
            return (*self._for_token_mode(loss, count), record)
        return self._for_microbatch_mode(loss, count), record

    def _for_token_mode(
        self, loss: torch.Tensor, count: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Per-token path: gradients are summed over d, m and c, then divided by sum_dmc n.
        if count is not None:
            return loss * 1.0, count
        # n = padded_tokens everywhere: sum_dmc (l * n) / (D * M * C * n) = sum_dmc l / (D * M * C).
        # Not n = 1, as the auxiliary losses are scaled to token sums there.
        tokens = torch.full((), self.padded_tokens, dtype=torch.int32, device=loss.device)
        return loss * float(self.padded_tokens), tokens

    def _for_microbatch_mode(self, loss: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
        # Legacy path of a pair: the schedule multiplies by C / M, DDP divides by D * C.
        if count is None:
            return loss / self._context_parallel_size
        # The microbatch's sequences are spread over the context-parallel ranks, so its count is the
        # sum over them, also on a shard without a valid token. The schedule's C cancels DDP's:
        # nothing else to divide by.
        total = count.clone()
        if self._context_parallel_size > 1:
            dist.all_reduce(total, group=self._context_parallel_group)
        return loss / total.clamp(min=1)

    def _parse(
        self, returned: Any, output: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, Mapping[str, Any]]:
        """Return loss, count (None in pattern 1) and metrics of a loss function's result."""
        if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
            raise UsageError(f"loss function: returned {_describe(returned)}; return {PATTERNS}")
        loss, metrics = returned[0], returned[-1]
        if not isinstance(metrics, Mapping):
            raise UsageError(
                f"loss function: returned {_describe(metrics)} for its metrics; return a dict of "
                f"names and values, the last element of {PATTERNS}"
            )
        if not isinstance(loss, torch.Tensor) or not loss.is_floating_point() or loss.numel() != 1:
            raise UsageError(
                f"loss function: returned {_describe(loss)} for the loss; return one floating "
                "point number as a tensor: a sum or a mean of the token losses"
            )
        if (
            torch.is_grad_enabled()
            and not loss.requires_grad
            and isinstance(output, torch.Tensor)
            and output.requires_grad
        ):
            raise UsageError(
                "loss function: the loss does not depend on the model's output (it has no "
                "grad_fn), so nothing would be trained; compute it from the output without "
                "detach() or item()"
            )
        pattern = len(returned) - 1
        if self._pattern is None:
            self._pattern = pattern
        elif pattern != self._pattern:
            raise UsageError(
                f"loss function: returned {len(returned)} elements, and {self._pattern + 1} "
                "earlier in this run, and the two patterns weigh microbatches differently; "
                f"return always {PATTERNS}"
            )
        count = None if pattern == 1 else _integer_count(returned[1], loss.device)
        return loss, count, metrics

    def _snapshots(
        self, metrics: Mapping[str, Any], loss: torch.Tensor, count: torch.Tensor | None
    ) -> dict[str, Metric]:
        if not metrics:
            metrics = {"loss": mean(loss) if count is None else token_mean(loss, count)}
        return {key: snapshot(as_metric(key, value), loss.device) for key, value in metrics.items()}


def _integer_count(count: Any, device: torch.device) -> torch.Tensor:
    """Return a token count as the int32 scalar that the schedules accumulate."""
    if isinstance(count, int) and not isinstance(count, bool):
        return torch.full((), count, dtype=torch.int32, device=device)
    if not isinstance(count, torch.Tensor) or count.numel() != 1:
        raise UsageError(
            f"loss function: returned {_describe(count)} for num_tokens; return one integer: the "
            "number of tokens in loss_sum"
        )
    if count.is_floating_point() or count.is_complex() or count.dtype == torch.bool:
        raise UsageError(
            f"loss function: returned num_tokens as {count.dtype}, and a count must be an integer, "
            "as float32 stops counting at 2**24; return num_tokens.to(torch.int)"
        )
    if count.device.type == "cpu" and device.type != "cpu":
        # Filled, as a copy from pageable memory would be a host-device sync.
        return torch.full((), int(count), dtype=torch.int32, device=device)
    return count.detach().reshape(()).to(device=device, dtype=torch.int32, copy=True)


def _collect(loss_func: Callable[..., Any] | None, output: Any) -> Any:
    """Call a loss function for its data, with ``non_loss_data`` only where it is a parameter."""
    if loss_func is None:
        return output
    parameters = inspect.signature(loss_func).parameters.values()
    if any(p.name == "non_loss_data" or p.kind is p.VAR_KEYWORD for p in parameters):
        return loss_func(output, non_loss_data=True)
    return loss_func(output)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, tuple | list):
        kinds = ", ".join(type(item).__name__ for item in value)
        return f"a {type(value).__name__} of {len(value)} ({kinds})"
    return f"{value!r} ({type(value).__name__})" if value is None else f"a {type(value).__name__}"
