"""How often a model's first choice is right: measured on logits, in every evaluation."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bridge.training.callbacks import Callback, CallbackContext
from bridge.training.megatron_import import quiet_import
from bridge.training.mimo_step import inputs_of
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.utils import unwrap_model


class AnswerAccuracy(Callback):
    """Adds ``accuracy`` to the metrics of every evaluation on the validation data.

    It is the part of the tokens with a loss mask that the model gives the highest probability, of
    all tokens of its vocabulary; one pass over the data more, without labels.
    """

    def on_train_start(self, context: CallbackContext) -> None:
        """See that the accuracy of every set can be measured.

        Raises:
            UsageError: Encoders have more replicas than the language model, and a set has another
                number of samples than they can divide.
        """
        assert context.data is not None
        unit = context.data.smallest_microbatch
        for name, dataset in context.data.sets("validation").items():
            samples = context.data.evaluation_samples(dataset)
            if samples % unit:
                raise UsageError(
                    f"{name} data: {samples} samples; their accuracy is measured on a multiple of "
                    f"{unit}, as microbatches of this layout hold no fewer: change the number of "
                    "samples, validation.eval_iters, or the data_parallel_size of the encoders"
                )

    def on_evaluate_end(self, context: CallbackContext, results: dict[str, float | None]) -> None:
        """Collect the counts of all ranks, and add their quotient."""
        if context.split != "validation" or not results:
            return
        assert context.data is not None
        for name in context.data.sets("validation"):
            counts = context.collect_non_loss_data(count_step, name)
            total = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())
            for count in counts:
                total += count
            # Of every microbatch as many ranks have a count: the quotient is the same.
            dist.all_reduce(total)
            right, asked = total.tolist()
            place = name.removeprefix("validation").lstrip("/")
            key = f"{place}/accuracy" if place else "accuracy"
            results[key] = right / asked if asked else None

    def on_train_end(self, context: CallbackContext) -> None:
        """Add the last accuracy to the summary of the run."""
        accuracy = context.validation.get("accuracy")
        if context.exception is None and accuracy is not None:
            context.summary.append(f"accuracy    {accuracy:.2%} of the held-out answers")


def count_step(
    data_iterator: Iterator[Mapping[str, Any]] | None, model: torch.nn.Module
) -> tuple[Any, Callable[..., Any]]:
    """Run one microbatch without its labels; the loss function counts what is right.

    Returns:
        Where the language model ends, the logits, [batch, sequence, vocabulary of this rank], and
        their loss function, which returns ``[right answers, answers]`` (int64); elsewhere what the
        modules there return.
    """
    batch = inputs_of(data_iterator, model)
    output, _ = model(**(batch | {"labels": None}))
    return output, partial(
        _count,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        group=unwrap_model(model).tp_group,
    )


def _count(
    logits: torch.Tensor,
    *,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    whole = gather_from_tensor_model_parallel_region(logits, group=group)
    asked = loss_mask != 0
    right = (whole.argmax(dim=-1) == labels) & asked
    return torch.stack([right.sum(), asked.sum()])
