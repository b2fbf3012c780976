"""The candidates for an adapter: the linear layers of a model that can have one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.extensions import transformer_engine as engine
from megatron.core.transformer.mlp import MLP
from megatron.core.utils import unwrap_model

from bridge.peft.layers.linear_layout import LinearLayout, find_layout
from bridge.peft.layers.module_names import named_modules

NOT_LINEAR = "it is no linear layer"
"""The reason against modules of other kinds. A pattern with * may match them too."""


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
    """Return the layers that can be adapted, and by name why each other module cannot."""
    layers: list[Layer] = []
    unadaptable: dict[str, str] = {}
    for chunk in model_chunks:
        root = unwrap_model(chunk)
        for name, local, module in named_modules(chunk):
            parent = root.get_submodule(local.rpartition(".")[0])
            layout = find_layout(module)
            if not isinstance(layout, LinearLayout):
                unadaptable[name] = layout or NOT_LINEAR
            elif engine.TEFusedMLP is not None and isinstance(parent, engine.TEFusedMLP):
                unadaptable[name] = (
                    "a fused MLP does not call it; set model.use_transformer_engine_op_fuser=false"
                )
            else:
                layers.append(Layer(name=name, module=module, parent=parent, layout=layout))
    return layers, unadaptable
