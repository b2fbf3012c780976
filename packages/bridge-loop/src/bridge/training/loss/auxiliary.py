"""megatron-core's auxiliary losses as metrics of a step.

Router z-loss, load-balancing losses and multi-token prediction do not pass through a loss function:
megatron-core adds them to the gradients and keeps their values in two trackers of the process.

With N the tokens in the main loss, the objective of a step in ``token`` normalization is

    (sum of token losses + coefficient * sum over layers of (value * real tokens) + ...) / N

so an auxiliary loss is a sum over tokens like the main loss, and all are divided once. Padding is
excluded. The loss mask does not matter: a prompt's tokens are real, so where N excludes them the
auxiliary losses weigh more relative to the main loss. In pattern 1, ``(loss, metrics)``, N is the
number of padded tokens. In ``microbatch`` normalization each microbatch adds
``coefficient * value``, whatever its masks.

The logged value has no coefficient: it is the mean over layers and, in ``token`` normalization,
over real tokens, else over microbatches.

The values are the same under every layout and, except for the balance of a microbatch (aux_loss),
under every micro batch size. megatron-core's global_aux_loss is an exception to both: its mean over
earlier microbatches depends on their number, and its weight falls with the data-parallel size.
"""

from typing import TYPE_CHECKING, Any

from bridge.training.loss.metrics import Metric, ratio

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

PADDING = "padding"
"""Tracked by a router: by layer, the fraction of a microbatch's padded tokens that are padding.

Its other values are then means over all padded tokens, in which padding counts 0.
"""
TARGETS = "mtp_targets"
"""Tracked by a model: by MTP layer, the fraction of a rank's padded tokens that have a target.

The losses that megatron-core tracks are then sums over targets / number of padded tokens.
"""


def clear() -> None:
    """Clear the values of earlier steps, before a step whose values are logged.

    An evaluation adds none.
    """
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    get_moe_metrics_tracker().clear()
    MTPLossLoggingHelper.clean_metrics_in_tracker()


def metrics(
    model: list[Any], num_microbatches: int, pg_collection: "ProcessGroupCollection"
) -> dict[str, Metric]:
    """Return this rank's part of the step's auxiliary losses; no host-device sync.

    The names are megatron-core's: ``z_loss``, ``load_balancing_loss``,
    ``seq_load_balancing_loss``, ``global_load_balancing_loss``, ``mtp_1 loss`` and so on, and with
    moe_per_layer_logging those of each layer, ``z_loss/layer_1``. A metric is the sum of the parts'
    values over all ranks, divided by the sum of their counts.

    Args:
        model: This rank's model chunks.
        num_microbatches: This rank's microbatches of the step.
        pg_collection: The process groups.
    """
    return _of_routers(model, num_microbatches, pg_collection) | _of_mtp_layers(
        num_microbatches, pg_collection
    )


def _of_routers(
    model: list[Any], num_microbatches: int, groups: "ProcessGroupCollection"
) -> dict[str, Metric]:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.router import Router

    tracked = get_moe_metrics_tracker().metrics
    names = tracked.keys() - {PADDING, TARGETS}
    if not names:
        return {}
    num_ranks = groups.tp_dp_cp.size()
    routers: list[Any] = [m for chunk in model for m in chunk.modules() if isinstance(m, Router)]
    count: Any = num_microbatches * len(routers)
    if PADDING in tracked:
        count = count - tracked[PADDING].values.sum()
    found = {}
    for name in sorted(names):
        entry = tracked[name]
        # megatron-core's own reduction, as a weight in a sum over all ranks.
        weight = 1.0
        if entry.avg_group is not None:
            weight = 1 / entry.avg_group.size()
        elif entry.needs_dp_avg:
            weight = 1 / groups.dp.size()
        found[name] = ratio(entry.values.sum() * weight, count / num_ranks)
        for layer in sorted(r.layer_number for r in routers if r.config.moe_per_layer_logging):
            padding = tracked[PADDING].values[layer - 1] if PADDING in tracked else 0
            found[f"{name}/layer_{layer}"] = ratio(
                entry.values[layer - 1] * weight, (num_microbatches - padding) / num_ranks
            )
    return found


def _of_mtp_layers(num_microbatches: int, groups: "ProcessGroupCollection") -> dict[str, Metric]:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    losses = MTPLossLoggingHelper.tracker.get("loss_values")
    if losses is None:
        return {}
    targets = get_moe_metrics_tracker().metrics.get(TARGETS)
    counts = [num_microbatches] * len(losses) if targets is None else targets.values
    # Tensor-parallel ranks all track the same, which cancels.
    return {
        f"mtp_{layer} loss": ratio(loss, count)
        for layer, (loss, count) in enumerate(zip(losses, counts, strict=True), start=1)
    }
