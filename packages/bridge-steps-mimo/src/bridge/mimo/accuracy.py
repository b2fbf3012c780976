"""The accuracy of a model's most probable token, counted on logits in every evaluation."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, override

import torch
import torch.distributed as dist

from bridge.training.callbacks import Callback, CallbackContext
from bridge.training.megatron_import import quiet_import
from bridge.training.mimo_step import read_inputs
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.utils import unwrap_model


class AnswerAccuracy(Callback):
    """A callback that adds ``accuracy`` to the metrics of every evaluation on validation data.

    A label that counts in the loss is right if it is the model's most probable token. The accuracy
    is the fraction of right labels. It takes a second pass over the data, without labels.
    """

    @override
    def on_train_start(self, context: CallbackContext) -> None:
        """Check that the accuracy of every set can be measured.

        Raises:
            UsageError: Encoders have more replicas than the language model, and cannot divide the
                samples of a set.
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

    @override
    def on_evaluate_end(self, context: CallbackContext, results: dict[str, float | None]) -> None:
        """Sum the counts of all ranks, and add their quotient."""
        if context.split != "validation" or not results:
            return
        assert context.data is not None
        for name in context.data.sets("validation"):
            counts = context.collect_non_loss_data(count_step, name)
            none = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())
            total = sum(counts, none)
            # Every microbatch is counted on the same number of ranks, so the quotient is right.
            dist.all_reduce(total)
            right, labels = total.tolist()
            key = f"{name.removeprefix('validation')}/accuracy".lstrip("/")
            results[key] = right / labels if labels else None

    @override
    def on_train_end(self, context: CallbackContext) -> None:
        """Add the last accuracy to the summary of the run."""
        accuracy = context.validation.get("accuracy")
        if context.exception is None and accuracy is not None:
            context.summary.append(f"accuracy    {accuracy:.2%} of the held-out answers")


def count_step(
    data_iterator: Iterator[Mapping[str, Any]] | None, model: torch.nn.Module
) -> tuple[Any, Callable[..., Any]]:
    """Run one microbatch without its labels; the loss function counts the right ones.

    Returns:
        Where the language model ends, the logits, [batch, sequence, vocabulary of this rank], and
        their loss function, which returns ``[right labels, labels]`` (int64). Elsewhere the output
        of the modules there.
    """
    batch = read_inputs(data_iterator, model)
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
    unsharded = gather_from_tensor_model_parallel_region(logits, group=group)
    counts = loss_mask != 0
    right = (unsharded.argmax(dim=-1) == labels) & counts
    return torch.stack([right.sum(), counts.sum()])
