"""The arrangement of a run's ranks, and of the layers on pipeline stages."""

from dataclasses import dataclass
from typing import Any

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.contracts import ArrangesRanks


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups; `tensor * pipeline * context * data == world_size`."""

    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    context: int
    expert: int
    expert_tensor: int
    data: int
    world_size: int
    most_parts: int | None = None
    """Parts that the samples of a global microbatch are divided into: the replicas of the module
    that has most. None: as many as `data`."""

    @property
    def model_ranks(self) -> int:
        """Ranks that one replica of the model is divided over."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_data(self) -> int:
        """Replicas of each expert (0 if the experts' layout does not fit)."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)


def layout_of(model: Any, world_size: int) -> Layout:
    """Return the layout of `model` on `world_size` ranks.

    A model is data-parallel only if it is not a megatron-core ``ModelParallelConfig`` and does not
    arrange its ranks itself (`ArrangesRanks`). Where the layout does not fit, which `resolve`
    reports, `data` is rounded down.
    """
    if isinstance(model, ArrangesRanks):
        return model.layout(world_size)
    if not isinstance(model, ModelParallelConfig):
        return Layout(
            tensor=1,
            pipeline=1,
            virtual_pipeline=None,
            context=1,
            expert=1,
            expert_tensor=1,
            data=world_size,
            world_size=world_size,
        )
    tensor = model.tensor_model_parallel_size
    model_ranks = tensor * model.pipeline_model_parallel_size * model.context_parallel_size
    expert_tensor = model.expert_tensor_parallel_size
    return Layout(
        tensor=tensor,
        pipeline=model.pipeline_model_parallel_size,
        virtual_pipeline=model.virtual_pipeline_model_parallel_size,
        context=model.context_parallel_size,
        expert=model.expert_model_parallel_size,
        expert_tensor=tensor if expert_tensor is None else expert_tensor,
        data=world_size // model_ranks,
        world_size=world_size,
    )


def placed_layers(model: TransformerConfig) -> PipelineParallelLayerLayout | None:
    """Return the layers by stage as model.pipeline_model_parallel_layout places them.

    None where there is no such placement, or megatron-core rejects it.
    """
    placed: Any = model.pipeline_model_parallel_layout
    if placed is None or isinstance(placed, PipelineParallelLayerLayout):
        return placed
    try:
        return PipelineParallelLayerLayout(placed, model.pipeline_model_parallel_size)
    except AssertionError:  # It is reported as megatron-core's own when its config is made.
        return None


def embedding_stages(model: Any) -> list[int]:
    """Return the pipeline ranks between which megatron-core adds the embedding's gradients.

    They are the first one, the last one for its output layer, and that of the MTP layers, which
    have a copy of the embedding. A rank of this group whose weight is no copy, such as an untied
    output layer after MTP layers, would get a wrong gradient.

    Args:
        model: A model section.
    """
    ranks = getattr(model, "pipeline_model_parallel_size", 1)
    placed = placed_layers(model) if isinstance(model, TransformerConfig) else None
    if placed is None or not model.mtp_num_layers:
        return sorted({0, ranks - 1})
    mtp_stages = {
        rank
        for rank, chunks in enumerate(placed.layout)
        if any(LayerType.mtp in layers for layers in chunks)
    }
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    return sorted({0} | mtp_stages | ({ranks - 1} if tied else set()))
