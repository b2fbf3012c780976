"""The loss of next-token training: a sum over positions, and their count.

A loss function returns a sum and a count, never a mean: the one division is over all microbatches
and ranks (`bridge.training.loss.normalization`).
"""

import torch


def masked_token_loss(
    loss_mask: torch.Tensor | None,
    output_tensor: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    *,
    check_for_nan_in_loss: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum per-token losses where the mask is not zero.

    With l the losses and w the mask, the sum is ``sum(w * l)`` in float32 and the count is the
    number of positions with ``w != 0``. A loss at a masked position does not count, even if it is
    NaN or Inf, and its gradient is exactly 0. Without a valid position the sum is 0.

    Args:
        loss_mask: Bool, integer or float, in the shape of the losses or flattened.
        output_tensor: Losses in nats, one for each token, such as ``[batch, sequence]``. A model
            that moves or drops positions returns a pair ``(losses, mask)``; its mask replaces
            `loss_mask`.
        check_for_nan_in_loss: Raise at once, by a host-device sync on every microbatch. Without it
            the loop finds NaN and Inf at the steps that it logs.

    Returns:
        The sum (float32 scalar), the count (int32 scalar) and ``{"lm loss": [sum, count]}``, a
        float64 tensor, which is exact for counts beyond 2**24.

    Raises:
        ValueError: The shapes do not match, or there is no mask.
        FloatingPointError: The sum is NaN or Inf and `check_for_nan_in_loss` is set.
    """
    if isinstance(output_tensor, tuple):
        losses, loss_mask = output_tensor
    else:
        losses = output_tensor
    if loss_mask is None:
        raise ValueError(
            "masked_token_loss got no loss_mask. Pass one in the shape of the losses "
            f"{tuple(losses.shape)}; all ones if every position counts."
        )
    if not _same_positions(losses.shape, loss_mask.shape):
        raise ValueError(
            f"loss_mask has shape {tuple(loss_mask.shape)}, the losses {tuple(losses.shape)}: "
            "the mask must have the losses' shape, or be flattened from it."
        )

    losses = losses.reshape(-1).float()
    loss_mask = loss_mask.reshape(-1)
    valid = loss_mask != 0
    # Selecting before the product keeps a masked NaN out of both passes: at a masked position
    # where() gives the constant 0 in the forward pass and a zero gradient in the backward pass.
    losses = torch.where(valid, losses, torch.zeros_like(losses))
    if loss_mask.is_floating_point():
        losses = losses * loss_mask.float()
    loss_sum = losses.sum()
    # An integer sum, as a float32 sum stops counting at 2**24.
    num_tokens = valid.sum().to(torch.int32)
    if check_for_nan_in_loss and not torch.isfinite(loss_sum):
        raise FloatingPointError(f"The sum of the token losses is {loss_sum.item()}.")

    # A tensor of its own: neither the loss nor the count may change it later.
    report = torch.stack((loss_sum.detach().double(), num_tokens.double()))
    return loss_sum, num_tokens, {"lm loss": report}


masked_next_token_loss = masked_token_loss


def _same_positions(losses: torch.Size, mask: torch.Size) -> bool:
    """Whether both shapes list the same positions in the same order."""
    if losses.numel() != mask.numel():
        return False
    losses_axes = [size for size in losses if size != 1]
    mask_axes = [size for size in mask if size != 1]
    return losses_axes == mask_axes or len(losses_axes) <= 1 or len(mask_axes) <= 1
