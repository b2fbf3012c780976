"""Layers that model.pipeline_model_parallel_layout places on pipeline stages."""

from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig


def placement_problems(model: TransformerConfig) -> Iterator[str]:
    """Yield a line for each placement that megatron-core accepts and does not train."""
    placed = _placed(model)
    if placed is None:
        return
    field = "model.pipeline_model_parallel_layout"
    ranks = model.pipeline_model_parallel_size
    chunks = placed.virtual_pipeline_model_parallel_size
    if chunks > 1 and model.virtual_pipeline_model_parallel_size is None:
        yield (
            f"{field}: {chunks * ranks} stages on model.pipeline_model_parallel_size={ranks} ranks "
            f"need model.virtual_pipeline_model_parallel_size={chunks}"
        )
    if chunks > 1 and LayerType.mtp in placed.layout[0][-1]:
        yield (
            f"{field}: the stage of the multi-token prediction layers (m) is on the rank of the "
            "embedding (E), where megatron-core does not add the gradients of its two copies; put "
            "m on the stage of another rank, such as that of the loss (mL)"
        )


def embedding_stages(model: Any) -> list[int]:
    """Return the pipeline ranks between which megatron-core adds the embedding's gradients.

    They are the first one, the last one for its output layer, and that of the multi-token
    prediction layers, which have a copy of the embedding. A rank of this group whose weight is no
    copy, as the untied output layer after such layers, would get a wrong gradient.

    Args:
        model: A model section.
    """
    ranks = getattr(model, "pipeline_model_parallel_size", 1)
    placed = _placed(model) if isinstance(model, TransformerConfig) else None
    if placed is None or not model.mtp_num_layers:
        return sorted({0, ranks - 1})
    copies = {
        rank
        for rank, chunks in enumerate(placed.layout)
        if any(LayerType.mtp in layers for layers in chunks)
    }
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    return sorted({0} | copies | ({ranks - 1} if tied else set()))


def _placed(model: TransformerConfig) -> PipelineParallelLayerLayout | None:
    """Return the placement; None where there is none, or megatron-core rejects it."""
    placed: Any = model.pipeline_model_parallel_layout
    if placed is None or isinstance(placed, PipelineParallelLayerLayout):
        return placed
    try:
        return PipelineParallelLayerLayout(placed, model.pipeline_model_parallel_size)
    except AssertionError:  # It is reported as megatron-core's own when its config is made.
        return None
