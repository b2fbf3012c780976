"""The projections from an encoder's width to that of the language model."""

import copy
from typing import TYPE_CHECKING, Any, override

import torch

from bridge.training.megatron_import import quiet_import
from bridge.training.model.initial_weights import draw_with
from bridge.training.transformer.layer_specs import backend_of

with quiet_import():
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


class LinearProjection(MegatronModule):
    """From the width of an encoder to that of the language model, by one matrix.

    Args:
        config: The finalized language model.
        input_size: Width of the encoder.
        pg_collection: The process groups of this module.
    """

    def __init__(
        self, config: TransformerConfig, *, input_size: int, pg_collection: "ProcessGroupCollection"
    ) -> None:
        super().__init__(config)
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self.linear = build_linear(config, input_size)

    @override
    def forward(self, encoded: torch.Tensor) -> torch.Tensor:
        """Project [tokens, encoder's width] to [tokens, hidden size of the language model]."""
        projected: torch.Tensor = self.linear(encoded)
        return projected


class MLPProjection(MegatronModule):
    """As `LinearProjection`, by two linear layers with a GELU between them.

    Its inner width is the language model's hidden size, sharded over tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, *, input_size: int, pg_collection: "ProcessGroupCollection"
    ) -> None:
        config = _config_of_mlp(config)
        super().__init__(config)
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self.mlp = MLP(
            config,
            _mlp_submodules(config),
            input_size=input_size,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=pg_collection.tp,
        )

    @override
    def forward(self, encoded: torch.Tensor) -> torch.Tensor:
        """Project [tokens, encoder's width] to [tokens, hidden size of the language model]."""
        projected, bias = self.mlp(encoded)
        output: torch.Tensor = projected + bias
        return output


def build_linear(config: TransformerConfig, input_size: int) -> torch.nn.Linear:
    """Return a layer to the config's width, unsharded, whose bias is zero at first."""
    layer = torch.nn.Linear(input_size, config.hidden_size)
    draw_with(layer.weight, initializer_of(config))
    torch.nn.init.zeros_(layer.bias)
    return layer


def initializer_of(config: TransformerConfig) -> Any:
    """Return the function that draws the weights of a finalized config."""
    assert config.init_method is not None
    return config.init_method


def _config_of_mlp(language: TransformerConfig) -> TransformerConfig:
    config = copy.copy(language)
    # The second layer reads the width between the two here, whatever the first was given.
    config.ffn_hidden_size = language.hidden_size
    config.gated_linear_unit = False
    config.activation_func = torch.nn.functional.gelu
    config.add_bias_linear = True
    config.bias_activation_fusion = False
    # Its input is not split along the sequence.
    config.sequence_parallel = False
    return config


def _mlp_submodules(config: TransformerConfig) -> MLPSubmodules:
    backend: Any = backend_of(config)
    return MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
