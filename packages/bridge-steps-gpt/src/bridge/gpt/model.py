"""megatron-core's GPT, with multi-token prediction that is the same under every layout.

The targets of MTP layer d are the labels moved by d positions. A target counts where the loss mask,
moved as well, is not zero. With w the moved masks, l the losses and N the tokens in the main loss,
the term in the objective is ``mtp_loss_scaling_factor`` times the mean over MTP layers of

    token         sum of all w * l / N, so that a target weighs as one of the main loss does
    microbatch    mean over microbatches of sum of w * l / count of w

megatron-core multiplies each sum by the ratio of the mask's counts before and after the move, or
divides it by the count after. Both are counts of a microbatch on one context-parallel rank, so
uneven masks make another objective for every micro batch size and context-parallel size.
"""

from typing import Any, override

import torch
import torch.distributed as dist

from bridge.training.loss.auxiliary import TARGETS
from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionLayer,
        roll_tensor,
    )


class GPT(GPTModel):
    """A chunk of a GPT, with the term of multi-token prediction above."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        """Build megatron-core's model."""
        super().__init__(*args, **arguments)
        self._target_weights: list[torch.Tensor] = []
        shares = self.post_process and self.share_embeddings_and_output_weights
        if shares and self.mtp_process and not self.pre_process:
            # This stage has the embedding, whose weight is passed to the output layer. The output
            # layer also has a weight of its own, which nothing reads and megatron-core cannot save.
            self.output_layer.weight = None

    # megatron-core passes all arguments by name.
    @override
    def _postprocess(self, **arguments: Any) -> Any:  # type: ignore[override]
        labels = arguments["labels"]
        if self.post_process and self.config.mtp_num_layers and labels is not None:
            self._target_weights = self._weights_of_targets(labels, arguments["loss_mask"])
            arguments["loss_mask"] = None  # the weights contain it
        try:
            return super()._postprocess(**arguments)  # type: ignore[no-untyped-call]
        finally:
            self._target_weights = []

    @override
    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the losses, [batch, sequence]; the MTP layers call this before the main loss."""
        losses: torch.Tensor = super().compute_language_model_loss(labels, logits)
        return losses * self._target_weights.pop(0) if self._target_weights else losses

    def _weights_of_targets(
        self, labels: torch.Tensor, loss_mask: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return for each MTP layer the factors that turn megatron-core's term into ours.

        They are [batch, sequence]. Without a mask, megatron-core counts all positions as targets
        except those to which no label is moved.
        """
        cp_group, positions = self.pg_collection.cp, labels.numel()
        per_token = self.config.calculate_per_token_loss
        everywhere = torch.ones_like(labels, dtype=torch.float32)
        mask = everywhere if loss_mask is None else loss_mask.float()
        moved = torch.stack((mask, everywhere))
        masks, labeled, counts = [], [], []
        for _ in range(self.config.mtp_num_layers or 0):
            moved, _ = roll_tensor(moved, cp_group=cp_group)
            masks.append(moved[0])
            labeled.append(moved[1].sum())
            counts.append((moved[0] != 0).sum().float())
        if per_token:
            self._track_targets(torch.stack(counts) / positions)
            return [m * n / positions for m, n in zip(masks, labeled, strict=True)]
        total = torch.stack(counts)
        if cp_group.size() > 1:
            dist.all_reduce(total, group=cp_group)
        # The gradients are averaged over the context-parallel ranks.
        scales = cp_group.size() / total.clamp(min=1)
        return [m * n * s for m, n, s in zip(masks, labeled, scales, strict=True)]

    def _track_targets(self, parts: torch.Tensor) -> None:
        if not self.training:
            return
        for layer, part in enumerate(parts, start=1):
            get_moe_metrics_tracker().record(TARGETS, part, layer, len(parts))


class PredictionLayer(MultiTokenPredictionLayer):
    """megatron-core's MTP layer, with the padding mask moved as the tokens are.

    Position i takes the token at i + 1. megatron-core moves each sequence-parallel rank's shard of
    the mask alone, and takes the last position for a real token, even after padding.
    """

    # megatron-core passes all arguments by name.
    @override
    def _get_embeddings(  # type: ignore[override]
        self, *, padding_mask: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[Any, ...]:
        input_ids, position_ids, _, embedded, hidden_states = super()._get_embeddings(**arguments)
        moved = None if padding_mask is None else self._moved(padding_mask)
        return input_ids, position_ids, moved, embedded, hidden_states

    def _moved(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a mask, [batch, this rank's sequence], moved by one position."""
        if self.sequence_parallel:
            full = gather_from_sequence_parallel_region(mask.t().contiguous(), group=self.tp_group)
            mask = full.t()
        moved: torch.Tensor
        moved, _ = roll_tensor(mask, cp_group=self.cp_group)
        if self.cp_group.rank() == 0:  # it has the first and the last chunk of the sequence
            moved[:, -1] = mask[:, -1]
        if self.sequence_parallel:
            shard = scatter_to_sequence_parallel_region(moved.t().contiguous(), group=self.tp_group)
            moved = shard.t().contiguous()
        return moved
