"""The experts' router: megatron-core's, with auxiliary losses that exclude padding.

With a padding mask megatron-core weights each rank by its own count of real tokens, and takes the
mean length of a microbatch's sequences for the length of each. Under tensor and context parallelism
padding is uneven, so the losses would depend on layout and micro batch size. Here, with P real
tokens in a microbatch and b sequences of P_s each, the loss that is added to the gradients is
coefficient times

    normalization      token                            microbatch
    z-loss             P * mean over real tokens        mean over real tokens
    batch-level        P * balance of the microbatch    balance of the microbatch
    sequence-level     sum_s P_s * balance of s         sum_s balance of s / b

which without padding are megatron-core's.
"""

from typing import Any, override

import torch
import torch.distributed as dist

from bridge.training.loss.auxiliary import PADDING
from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """megatron-core's top-k router with the auxiliary losses of the module's docstring."""

    _padding: torch.Tensor | None = None
    """True at padding, [sequence * batch], while a microbatch with a mask is trained."""
    _real: torch.Tensor
    """Real tokens of each of its sequences, [batch], over all ranks with shards of them."""
    _positions: int
    """Its padded tokens on all those ranks."""

    @override
    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts, and add the auxiliary losses to the gradients.

        Args:
            logits: [sequence, batch, experts].
            padding_mask: True at padding, [sequence, batch].

        Returns:
            The weights of the chosen experts and which they are, [sequence * batch, experts].
        """
        if padding_mask is None or not (self.training and torch.is_grad_enabled()):
            routed: tuple[torch.Tensor, torch.Tensor] = super().routing(logits, padding_mask)
            return routed
        self._padding = padding_mask.reshape(-1)
        self._real = (~padding_mask).sum(dim=0).float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(self._real, group=self.tp_cp_group)
        self._positions = padding_mask.numel() * self.tp_cp_group.size()
        if self.calculate_per_token_loss:
            self._track(PADDING, 1.0 - self._weight())
        try:
            # megatron-core would divide 0 / 0 for a microbatch of padding; here its weight is 0.
            routed = super().routing(logits, padding_mask & (self._real.sum() > 0))
            return routed
        finally:
            self._padding = None

    @override
    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add the z-loss to the gradients of `logits`, [sequence * batch, experts]."""
        coefficient = self.config.moe_z_loss_coeff
        if self._padding is None or coefficient is None:
            attached: torch.Tensor = super().apply_z_loss(logits, padding_mask)
            return attached
        squares = logits.float().logsumexp(dim=-1).square() * ~self._padding
        # This rank's part of the mean; the ranks' gradients are summed.
        part = self._weight() * squares.sum() / self._real.sum().clamp(min=1)
        self._track("z_loss", part * self.tp_cp_group.size())
        scale = self._positions if self.calculate_per_token_loss else 1
        attached = MoEAuxLossAutoScaler.apply(logits, coefficient * scale * part)
        return attached

    @override
    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        *args: Any,
        **arguments: Any,
    ) -> torch.Tensor:
        """Add a load-balancing loss, of which `aux_loss` is this rank's part, to the gradients."""
        if self._padding is not None:
            # Without a count megatron-core multiplies by the number of positions.
            aux_loss, arguments["valid_token_count"] = aux_loss * self._weight(), None
        attached: torch.Tensor = super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **arguments
        )
        return attached

    def _weight(self) -> torch.Tensor:
        """Return the weight of a mean over the microbatch's real tokens in the step's mean."""
        total = self._real.sum()
        return total / self._positions if self.calculate_per_token_loss else (total > 0).float()

    @override
    def _apply_seq_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        if self._padding is not None:
            # megatron-core divides by the square of the mean length of the sequences.
            relative = self._real.mean() / self._real.clamp(min=1)
            if not self.calculate_per_token_loss:
                relative = relative.square()
            by_sequence = scores_for_aux_loss.view(seq_length, bsz, -1)
            scores_for_aux_loss = (by_sequence * relative[:, None]).view_as(scores_for_aux_loss)
        attached: torch.Tensor = super()._apply_seq_aux_loss(
            probs, scores_for_aux_loss, routing_map, seq_length, bsz, with_padding_mask
        )
        return attached

    @override
    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        # megatron-core combines [tokens, experts] with [tokens].
        mask = padding_mask if self._padding is None else self._padding
        super()._apply_expert_bias(routing_map, None if mask is None else mask[:, None])

    def _track(self, name: str, value: torch.Tensor) -> None:
        """Add a value of this layer that is a mean over ranks to megatron-core's tracker."""
        layers, layer = self.config.num_layers, self.layer_number
        mtp_layers = self.config.mtp_num_layers or 0
        if layer is None:
            return
        if self.is_mtp_layer and self.config.mtp_use_repeated_layer:
            value = value / mtp_layers  # recorded once for each MTP layer
        get_moe_metrics_tracker().record(
            name,
            value,
            layer + layers * self.is_mtp_layer,
            layers + mtp_layers,
            avg_group=self.tp_dp_cp_group,
        )
