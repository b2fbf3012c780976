"""Canonical LoRA: a separate update for each part of megatron-core's fused layers.

``linear_qkv`` holds the projections to queries, keys and values. ``linear_fc1`` of a gated MLP
holds the gate and the values that it multiplies. LoRA gives such a layer one A for all of its
parts. Here each part has an A and a B, as a separate layer would, and any of them may be skipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast, override

import torch
from megatron.core.transformer.attention import SelfAttention

from bridge.peft.adapters.adapter import Adapter, Update
from bridge.peft.adapters.low_rank import LowRankAdapter, gather_like
from bridge.peft.layers.candidates import Layer
from bridge.peft.lora import LoRAAdapter
from bridge.peft.low_rank_method import LowRankMethod
from bridge.peft.usage_error import UsageError

_QKV = ("linear_q", "linear_k", "linear_v")
_GATED = ("linear_fc1_gate", "linear_fc1_up")


@dataclass(kw_only=True)
class CanonicalLoRA(LowRankMethod):
    """LoRA with one update each for queries, keys, values, gate and up projection."""

    target_modules: list[str] = field(
        default_factory=lambda: [*_QKV, "linear_proj", *_GATED, "linear_fc2"]
    )
    """Layers to adapt: the end of their dotted names, or a pattern with * for whole names. Fused
    layers go by the names of their parts: linear_q, linear_k, linear_v; linear_fc1_gate and
    linear_fc1_up of a gated MLP."""
    adapter_class: ClassVar = LoRAAdapter
    method: Literal["canonical_lora"] = "canonical_lora"
    """The method's name."""

    @override
    def names_of(self, layer: Layer) -> list[str]:
        """Return the names of a fused layer's parts, or the layer's."""
        parent = layer.name.removesuffix(layer.own_name)
        return [f"{parent}{part}" for part in _parts_of(layer)] or [layer.name]

    @override
    def build_adapter(self, layer: Layer, selected: Sequence[str]) -> Adapter:
        """Build the adapter of a layer.

        Raises:
            UsageError: A group of queries is split over tensor-parallel ranks.
        """
        if not _parts_of(layer):
            return super().build_adapter(layer, selected)
        rows = _rows_of_parts(layer)
        selected_parts = {name.rpartition(".")[2] for name in selected}
        parts = {
            part: LowRankAdapter(
                layer.weight, layer.layout, rows=rows.groups * width, **self.adapter_options()
            )
            for part, width in rows.widths.items()
            if part in selected_parts
        }
        return FusedLayerAdapter(parts, rows)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The order of a fused layer's rows: group after group, and part after part in each."""

    groups: int
    widths: dict[str, int]
    """Rows of each part within a group, in the order of the layer."""


class FusedLayerAdapter(Adapter):
    """The adapters of the parts of a fused layer, of which some may have none.

    Args:
        parts: The adapters by the name of their part.
        rows: The order of the layer's rows on this rank.
    """

    def __init__(self, parts: Mapping[str, LowRankAdapter], rows: Rows) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict(parts)
        self._rows = rows

    @override
    def forward(
        self, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of the adapted layer (see `Adapter`)."""
        parts = self._adapters()
        layout = next(iter(parts.values())).layout
        deltas = {name: part.update(x) for name, part in parts.items()}
        return output + gather_like(self._combine(deltas), output, layout)

    @override
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the updates of its parts added, in float32."""
        deltas = {name: part.delta_weight().t() for name, part in self._adapters().items()}
        return weight.float() + self._combine(deltas).t()

    @override
    def updates(self) -> list[Update]:
        """Return an update for each part that has an adapter."""
        rows = self._rows_by_part()
        return [
            Update(
                rows=rows[name],
                a=part.linear_in.weight,
                b=part.linear_out.weight,
                scale=part.scale,
            )
            for name, part in self._adapters().items()
        ]

    def _rows_by_part(self) -> dict[str, torch.Tensor]:
        """Return the indices of each part's rows in the layer, in the part's order."""
        groups, widths = self._rows.groups, self._rows.widths
        indices = torch.arange(groups * sum(widths.values())).view(groups, -1)
        parts = indices.split(list(widths.values()), dim=1)
        return {name: part.flatten() for name, part in zip(widths, parts, strict=True)}

    def _adapters(self) -> dict[str, LowRankAdapter]:
        return cast("dict[str, LowRankAdapter]", dict(self.parts.items()))

    def _combine(self, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Put [..., rows of a part] of the parts in the layer's order, zeros for an absent part."""
        some = next(iter(deltas.values()))
        shape, groups = some.shape[:-1], self._rows.groups
        blocks = [
            deltas[name].unflatten(-1, (groups, width))
            if name in deltas
            else some.new_zeros((*shape, groups, width))
            for name, width in self._rows.widths.items()
        ]
        return torch.cat(blocks, dim=-1).flatten(-2)


def _parts_of(layer: Layer) -> tuple[str, ...]:
    """Return the names of a fused layer's parts, none if it is not fused."""
    if isinstance(layer.parent, SelfAttention) and layer.own_name == "linear_qkv":
        return _QKV
    return _GATED if layer.is_gated else ()


def _rows_of_parts(layer: Layer) -> Rows:
    rows = layer.weight.shape[0]
    if not isinstance(layer.parent, SelfAttention):
        return Rows(groups=1, widths=dict.fromkeys(_GATED, rows // 2))
    config = layer.parent.config
    groups = config.num_query_groups or config.num_attention_heads
    if groups % layer.layout.num_ranks:
        raise UsageError(
            f"peft.method=canonical_lora: model.num_query_groups={groups} is not a multiple of "
            f"model.tensor_model_parallel_size={layer.layout.num_ranks}, so ranks share keys; "
            "choose another layout or peft.method=lora"
        )
    if config.attention_output_gate:
        raise UsageError(
            f"{layer.name}: model.attention_output_gate=true puts a gate among queries, keys and "
            "values, which canonical LoRA does not know; choose peft.method=lora"
        )
    width = config.kv_channels or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // groups * width
    widths = dict(zip(_QKV, (queries, width, width), strict=True))
    return Rows(groups=groups // layer.layout.num_ranks, widths=widths)
