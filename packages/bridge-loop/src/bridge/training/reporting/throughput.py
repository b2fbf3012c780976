"""Throughput of a run: tokens a second, and the fraction of the devices' peak (MFU)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from bridge.training.contracts import TOKENS

# Dense bf16 peaks in FLOP/s from NVIDIA's data sheets (half of a figure "with sparsity"), for the
# names that torch.cuda.get_device_name gives. The first entry whose words all occur counts.
_BF16_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB200",), 2.5e15),
    (("B200",), 2.25e15),
    (("GH200",), 989e12),
    (("H200", "NVL"), 835.5e12),
    (("H200",), 989e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835.5e12),
    (("H100",), 989e12),
    (("A100",), 312e12),
)


@runtime_checkable
class CountsFlops(Protocol):
    """A model section that counts its FLOPs; without it a run reports no MFU."""

    def training_flops_per_token(self) -> float:
        """Return the FLOPs of forward and backward for one token, without recomputation.

        By convention 6 W + 6 L s d: W the weights that a token is multiplied with (the output
        layer, not the input embedding), and the causal half of 12 L s d for the attention
        matrices (PaLM, arXiv:2204.02311, appendix B, has the full one), with L layers, s positions
        and d the heads times their width.
        """
        ...


@runtime_checkable
class CountsWeightGradients(CountsFlops, Protocol):
    """A model section that can be frozen, and counts the FLOPs that are not computed then."""

    def weight_gradient_flops_per_token(self) -> float:
        """Return the part of `training_flops_per_token` that goes into the weights' gradients.

        That is 2 W, a third of the FLOPs of a token at each weight that it is multiplied with.
        """
        ...


def model_flops_per_token(model: object, *, adapter_weights: float | None = None) -> float | None:
    """Return the FLOPs of a token's forward and backward pass; None if they are not counted.

    Args:
        model: The model's configuration.
        adapter_weights: Weights of adapters that a token is multiplied with, where they train and
            the model is frozen; None where the model trains. Gradients still pass through all of
            its layers, while those of its weights are not computed.
    """
    if adapter_weights is None:
        return model.training_flops_per_token() if isinstance(model, CountsFlops) else None
    if not isinstance(model, CountsWeightGradients):
        return None
    frozen = model.training_flops_per_token() - model.weight_gradient_flops_per_token()
    return frozen + 6.0 * adapter_weights


def peak_bf16_flops(device_name: str) -> float | None:
    """Look up the dense bf16 peak in FLOP/s (NVIDIA data sheets); None for an unknown device.

    A slice of a device (MIG) is unknown too: its peak is not that of the device.
    """
    words = set(device_name.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for names, peak in _BF16_PEAKS if words.issuperset(names)), None)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Computes the rates of an interval."""

    flops_per_token: float | None = None
    """The result of `model_flops_per_token`."""
    peak_flops: float | None = None
    """Peak of one device in FLOP/s; None where it is unknown, as of a CPU."""
    world_size: int = 1

    def rates(
        self,
        *,
        samples: int,
        seconds: float,
        counts: Mapping[str, int],
    ) -> dict[str, float]:
        """Return tokens_per_s and samples_per_s of the whole run, and mfu where it is known.

        Args:
            samples: Samples trained on in the interval, over all ranks.
            seconds: Length of the interval.
            counts: "tokens" and other items of the data in the interval; NAME becomes NAME_per_s.
        """
        rates = {"tokens_per_s": counts[TOKENS] / seconds, "samples_per_s": samples / seconds}
        rates |= {f"{name}_per_s": count / seconds for name, count in counts.items()}
        if self.flops_per_token is not None and self.peak_flops is not None:
            achieved = rates["tokens_per_s"] * self.flops_per_token
            rates["mfu"] = achieved / (self.peak_flops * self.world_size)
        return rates
