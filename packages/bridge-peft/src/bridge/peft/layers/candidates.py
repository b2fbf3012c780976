"""The candidates for an adapter: the linear layers of a model that can have one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.mlp import MLP
from megatron.core.utils import unwrap_model

from bridge.peft.layers.linear_layout import LinearLayout, find_layout
from bridge.peft.layers.module_names import named_modules

NO_LINEAR = "it is no linear layer"
"""The reason against modules of other kinds, which a pattern with * may match by the way."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer that can be adapted."""

    name: str
    """Its name in the unsharded model."""
    module: torch.nn.Module
    parent: torch.nn.Module
    layout: LinearLayout

    @property
    def own_name(self) -> str:
        """Its name within its parent."""
        return self.name.rpartition(".")[2]

    @property
    def weight(self) -> torch.Tensor:
        """The shard of its weight on this rank, [out features, in features]."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def is_gated(self) -> bool:
        """Whether its output is a gate followed by the values that it multiplies."""
        mlp = self.parent
        return (
            isinstance(mlp, MLP) and self.own_name == "linear_fc1" and mlp.config.gated_linear_unit
        )


def find_layers(
    model_chunks: Sequence[torch.nn.Module],
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers that can be adapted, and by name the reason against each other module."""
    layers: list[Layer] = []
    unadaptable: dict[str, str] = {}
    for chunk in model_chunks:
        root = unwrap_model(chunk)
        for name, local, module in named_modules(chunk):
            parent = root.get_submodule(local.rpartition(".")[0])
            layout = find_layout(module)
            if not isinstance(layout, LinearLayout):
                unadaptable[name] = layout or NO_LINEAR
            elif _is_fused(parent):
                unadaptable[name] = (
                    "a fused MLP does not call it; set model.use_transformer_engine_op_fuser=false"
                )
            else:
                layers.append(Layer(name=name, module=module, parent=parent, layout=layout))
    return layers, unadaptable


def _is_fused(parent: torch.nn.Module) -> bool:
    if not HAVE_TE:
        return False
    from megatron.core.extensions import transformer_engine as engine

    fused = getattr(engine, "TEFusedMLP", None)
    return fused is not None and isinstance(parent, fused)
