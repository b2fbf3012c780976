"""A linear layer with an adapter beside it: what stands in a model in place of the layer."""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from bridge.peft.linears import Linear


class Adapter(Protocol):
    """The module that changes what a linear layer gives."""

    def __call__(
        self, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of the adapted layer.

        Args:
            x: The input of the base layer's product.
            output: What the base layer gave.
            bias: The bias that is in it; None if none is.
        """
        ...

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight, in float32, of a plain layer that does what the adapted one does."""
        ...

    def updates(self) -> list["Update"]:
        """Return what it does to the weight, in parts."""
        ...


@dataclass(frozen=True, kw_only=True)
class Update:
    """Some rows of a weight W become W + scale * B A, then as long as `magnitude` says, if at all.

    `rows` are their indices in the order of B's rows; None for all of them in theirs.
    """

    rows: torch.Tensor | None = None
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None


class AdaptedLinear(torch.nn.Module):
    """A frozen linear layer and its adapter.

    It is called as the layer is, returns what the layer returns, and lets callers read the layer's
    attributes. In checkpoints the layer's own tensors keep their names; those of the adapter stand
    under ``adapter``.

    Args:
        name: Of the layer in the whole model.
        base: The layer.
        linear: What `bridge.peft.linears.describe` says of it.
        adapter: The adapter, an `Adapter`.
    """

    def __init__(
        self, name: str, base: torch.nn.Module, linear: Linear, adapter: torch.nn.Module
    ) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.adapter = adapter
        self.linear = linear
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer and change its output.

        Args:
            x: The layer's input.
            args: Passed on to the layer.
            kwargs: Passed on to the layer.
        """
        result = self.base(x, *args, **kwargs)
        output, *rest = result if isinstance(result, tuple) else (result,)
        if self.linear.normalize is not None:
            x = self.linear.normalize(x)
        adapted = self.adapter(x, output, self._bias_within(rest)).to(output.dtype)
        return (adapted, *rest) if isinstance(result, tuple) else adapted

    def _bias_within(self, rest: list[Any]) -> torch.Tensor | None:
        bias = getattr(self.base, "bias", None)
        returned = rest and rest[0] is not None
        return None if bias is None or returned or not bias.numel() else bias

    def low_rank_updates(self) -> list[Update]:
        """Return what the layer's weight is changed by, as far as this rank holds it."""
        return cast(Adapter, self.adapter).updates()

    @torch.no_grad()
    def merge(self) -> torch.nn.Module:
        """Fold the adapter into the layer's weight; return the layer."""
        weight: Any = self.base.weight
        weight.copy_(cast(Adapter, self.adapter).merged(weight))
        return self.base

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Any = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the layer's and the adapter's tensors with their places in the whole model."""
        assert metadata is not None
        found: ShardedStateDict = sharded_state_dict_default(
            self.base, prefix, sharded_offsets, metadata, tp_group=self.linear.group
        )
        for path, part in self.adapter.named_modules():
            tensors = dict(part.named_parameters(recurse=False))
            below = f"{prefix}adapter.{path}." if path else f"{prefix}adapter."
            entries = make_sharded_tensors_for_checkpoint(
                tensors,
                below,
                {
                    name: parameter.partition_dim
                    for name, parameter in tensors.items()
                    if parameter.partition_dim >= 0
                },
                sharded_offsets,
                tp_group=self.linear.group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for name, parameter in tensors.items():
                if getattr(parameter, "is_gated", False):
                    entries[below + name] = apply_swiglu_sharded_factory(
                        entries[below + name],
                        sharded_offsets,
                        metadata.get("singleton_local_shards", False),
                    )
            found.update(entries)
        return found
