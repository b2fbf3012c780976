"""The wrapper that replaces a linear layer in a model: the layer and an adapter on top of it."""

from typing import Any, override

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from bridge.peft.adapters.adapter import Adapter, Update
from bridge.peft.layers.linear_layout import LinearLayout


class AdaptedLinear(torch.nn.Module):
    """A frozen linear layer and its adapter.

    It is called as the layer is, returns what the layer returns, and lets callers read the layer's
    attributes. In checkpoints the layer's own tensors keep their names, and those of the adapter
    are under ``adapter``.

    Args:
        name: The layer's name in the unsharded model.
        base: The layer.
        layout: The layer's layout.
        adapter: The adapter.
    """

    def __init__(
        self, name: str, base: torch.nn.Module, layout: LinearLayout, adapter: Adapter
    ) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.adapter = adapter
        self.layout = layout
        self.train(base.training)

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    @override
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer and change its output.

        Args:
            x: The layer's input.
            args: Passed on to the layer.
            kwargs: Passed on to the layer.
        """
        result = self.base(x, *args, **kwargs)
        output, *rest = result if isinstance(result, tuple) else (result,)
        if self.layout.normalize is not None:
            x = self.layout.normalize(x)
        adapted = self.adapter(x, output, self._bias_in_output(rest)).to(output.dtype)
        return (adapted, *rest) if isinstance(result, tuple) else adapted

    def _bias_in_output(self, rest: list[Any]) -> torch.Tensor | None:
        bias = getattr(self.base, "bias", None)
        is_returned = rest and rest[0] is not None
        return None if bias is None or is_returned or not bias.numel() else bias

    def low_rank_updates(self) -> list[Update]:
        """Return the changes of the layer's weight, those of the rows on this rank."""
        return self.adapter.updates()

    @torch.no_grad()
    def merge(self) -> torch.nn.Module:
        """Merge the adapter into the layer's weight, and return the layer."""
        weight: Any = self.base.weight
        weight.copy_(self.adapter.merged(weight))
        return self.base

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Any = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the tensors of layer and adapter, with their offsets in the unsharded model."""
        assert metadata is not None
        state: ShardedStateDict = sharded_state_dict_default(
            self.base, prefix, sharded_offsets, metadata, tp_group=self.layout.group
        )
        for path, part in self.adapter.named_modules():
            tensors = dict(part.named_parameters(recurse=False))
            part_prefix = f"{prefix}adapter.{path}." if path else f"{prefix}adapter."
            entries = make_sharded_tensors_for_checkpoint(
                tensors,
                part_prefix,
                {
                    name: parameter.partition_dim
                    for name, parameter in tensors.items()
                    if parameter.partition_dim >= 0
                },
                sharded_offsets,
                tp_group=self.layout.group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for name, parameter in tensors.items():
                if getattr(parameter, "is_gated", False):
                    entries[part_prefix + name] = apply_swiglu_sharded_factory(
                        entries[part_prefix + name],
                        sharded_offsets,
                        metadata.get("singleton_local_shards", False),
                    )
            state.update(entries)
        return state
