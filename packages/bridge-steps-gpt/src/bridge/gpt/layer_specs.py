"""The MTP layers of a GPT; its other layers are `bridge.training.transformer.layer_specs`."""

import dataclasses
from typing import Any

from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec_for_backend,
    )
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.gpt.model import PredictionLayer
    from bridge.training.transformer.layer_specs import (
        adapt_layer,
        backend_of,
        uses_transformer_engine,
    )


def mtp_block_spec(
    config: TransformerConfig, *, vp_stage: int | None, pp_rank: int
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the MTP layers of a model chunk, None if it has none."""
    if not config.mtp_num_layers:
        return None
    layers: Any = get_gpt_decoder_layer_specs(
        config,
        use_transformer_engine=uses_transformer_engine(config),
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    block: Any = get_gpt_mtp_block_spec_for_backend(
        config=config,
        spec=adapt_layer(layers[-1], config),
        backend=backend_of(config),
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if block is None:
        return None
    return MultiTokenPredictionBlockSubmodules(
        layer_specs=[
            dataclasses.replace(layer, module=PredictionLayer) for layer in block.layer_specs
        ]
    )
