"""Checks of the parallel layout: the sizes, the ranks, the pipeline's stages, the sequence."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config.checks.bounds import PARALLEL_SIZES, bound_problems
from bridge.training.config.checks.contradictions import batch_problems
from bridge.training.config.checks.own_sections import as_problem
from bridge.training.config.checks.transformer import transformer_problems
from bridge.training.config.container import ConfigContainer
from bridge.training.config.derivation import sources_of, transformer_configs
from bridge.training.config.layout import Layout, layout_of, placed_layers
from bridge.training.config.schema.errors import Problem
from bridge.training.contracts import ArrangesRanks, DrawsLayout


@runtime_checkable
class HasSequenceLength(Protocol):
    """A model whose samples have a fixed length."""

    seq_length: int


def layout_problems(config: ConfigContainer, world_size: int) -> list[Problem]:
    """Return the reasons why model and batches do not fit on `world_size` ranks.

    Sizes that the model's section derives are called by the fields that they are derived from. The
    last problem has a picture of the layout where the model draws one.
    """
    problems = list(_size_problems(config, world_size))
    if world_size < 1:
        problems.append(Problem((), f"the world size {world_size} must be positive"))
    elif not problems:
        problems.extend(_problems_of_valid_sizes(config, world_size))
    if problems and isinstance(config.model, DrawsLayout) and world_size >= 1:
        drawn = config.model.layout_picture(world_size) or ""
        text = problems[-1].text + "".join(f"\n      {line}" for line in drawn.splitlines())
        problems[-1] = problems[-1].with_text(text)
    return problems


def _size_problems(config: ConfigContainer, world_size: int) -> Iterator[Problem]:
    model = config.model
    if isinstance(model, ModelParallelConfig):
        yield from bound_problems(PARALLEL_SIZES, model, "model")
    elif world_size >= 1 and isinstance(model, ArrangesRanks):
        yield from (as_problem(line, "model") for line in model.layout_problems(world_size))


def _problems_of_valid_sizes(config: ConfigContainer, world_size: int) -> Iterator[Problem]:
    model = config.model
    layout = layout_of(model, world_size)
    yield from batch_problems(config, layout)
    if isinstance(model, ModelParallelConfig):
        yield from _rank_problems(model, layout)
        yield from _pipeline_problems(model, layout)
        yield from _sequence_problems(model, layout)
    sources = sources_of(config)
    for path, part in transformer_configs(config).items():
        yield from transformer_problems(part, layout_of(part, world_size), path, sources)


def _rank_problems(model: ModelParallelConfig, layout: Layout) -> Iterator[Problem]:
    if layout.world_size % layout.model_ranks:
        yield Problem(
            (
                "model.tensor_model_parallel_size",
                "model.pipeline_model_parallel_size",
                "model.context_parallel_size",
            ),
            f"{layout.world_size} ranks are not a multiple of model.tensor_model_parallel_size="
            f"{layout.tensor} x model.pipeline_model_parallel_size={layout.pipeline} x "
            f"model.context_parallel_size={layout.context} = {layout.model_ranks}; start a "
            "multiple of that (--nproc, or a launcher), or lower one of the sizes",
        )
    elif layout.world_size % (layout.expert_tensor * layout.expert * layout.pipeline):
        yield Problem(
            (
                "model.expert_tensor_parallel_size",
                "model.expert_model_parallel_size",
                "model.pipeline_model_parallel_size",
            ),
            f"{layout.world_size} ranks are not a multiple of model.expert_tensor_parallel_size="
            f"{layout.expert_tensor} x model.expert_model_parallel_size={layout.expert} x "
            f"model.pipeline_model_parallel_size={layout.pipeline}",
        )
    if model.sequence_parallel and layout.tensor == 1:
        yield Problem(
            ("model.sequence_parallel", "model.tensor_model_parallel_size"),
            "model.sequence_parallel=true: needs model.tensor_model_parallel_size above 1; "
            "set it to false",
        )
    if model.overlap_moe_expert_parallel_comm and layout.expert == 1:
        yield Problem(
            ("model.overlap_moe_expert_parallel_comm", "model.expert_model_parallel_size"),
            "model.overlap_moe_expert_parallel_comm=true: needs model.expert_model_parallel_size "
            "above 1; set it to false",
        )


def _pipeline_problems(model: ModelParallelConfig, layout: Layout) -> Iterator[Problem]:
    virtual = layout.virtual_pipeline
    if virtual is not None and virtual > 1 and layout.pipeline == 1:
        yield Problem(
            ("model.virtual_pipeline_model_parallel_size", "model.pipeline_model_parallel_size"),
            f"model.virtual_pipeline_model_parallel_size={virtual}: needs "
            "model.pipeline_model_parallel_size above 1; leave it out",
        )
    if model.overlap_p2p_comm and model.batch_p2p_comm:
        yield Problem(
            ("model.overlap_p2p_comm", "model.batch_p2p_comm"),
            "model.overlap_p2p_comm=true: needs model.batch_p2p_comm=false; set that",
        )
    if model.overlap_p2p_comm and layout.pipeline > 1 and (virtual or 1) == 1:
        yield Problem(
            ("model.overlap_p2p_comm", "model.virtual_pipeline_model_parallel_size"),
            "model.overlap_p2p_comm=true: needs model.virtual_pipeline_model_parallel_size above "
            "1, as only the interleaved schedule overlaps; leave it out",
        )
    if isinstance(model, TransformerConfig):
        yield from _placement_problems(model)
        yield from _even_stage_problems(model, layout)


def _placement_problems(model: TransformerConfig) -> Iterator[Problem]:
    """Yield placements of layers on stages that megatron-core accepts and does not train."""
    placed = placed_layers(model)
    if placed is None:
        return
    field = "model.pipeline_model_parallel_layout"
    ranks = model.pipeline_model_parallel_size
    chunks = placed.virtual_pipeline_model_parallel_size
    if chunks > 1 and model.virtual_pipeline_model_parallel_size is None:
        yield Problem(
            (
                field,
                "model.pipeline_model_parallel_size",
                "model.virtual_pipeline_model_parallel_size",
            ),
            f"{field}: {chunks * ranks} stages on model.pipeline_model_parallel_size={ranks} ranks "
            f"need model.virtual_pipeline_model_parallel_size={chunks}; set that",
        )
    if chunks > 1 and LayerType.mtp in placed.layout[0][-1]:
        yield Problem(
            (field,),
            f"{field}: the stage of the multi-token prediction layers (m) is on the rank of the "
            "embedding (E), where megatron-core does not add the gradients of its two copies; put "
            "m on the stage of another rank, such as that of the loss (mL)",
        )


def _even_stage_problems(model: TransformerConfig, layout: Layout) -> Iterator[Problem]:
    uneven = (
        model.num_layers_in_first_pipeline_stage is not None
        or model.num_layers_in_last_pipeline_stage is not None
        or model.pipeline_model_parallel_layout is not None
        or model.account_for_embedding_in_pipeline_split
        or model.account_for_loss_in_pipeline_split
    )
    virtual = layout.virtual_pipeline
    stages = layout.pipeline * (virtual or 1)
    if not uneven and model.num_layers % stages:
        fields = ["model.num_layers", "model.pipeline_model_parallel_size"]
        times = ""
        if virtual:
            fields.append("model.virtual_pipeline_model_parallel_size")
            times = f" x model.virtual_pipeline_model_parallel_size={virtual}"
        yield Problem(
            tuple(fields),
            f"model.num_layers={model.num_layers}: is not a multiple of "
            f"model.pipeline_model_parallel_size={layout.pipeline}{times} = {stages} stages; "
            "change one",
        )


def _sequence_problems(model: ModelParallelConfig, layout: Layout) -> Iterator[Problem]:
    if not isinstance(model, HasSequenceLength):
        return
    length, context, tensor = model.seq_length, layout.context, layout.tensor
    if not isinstance(length, int) or length < 1:
        yield Problem(
            ("model.seq_length",), f"model.seq_length={length}: must be positive; raise it"
        )
        return
    if context > 1 and length % (2 * context):
        yield Problem(
            ("model.seq_length", "model.context_parallel_size"),
            f"model.seq_length={length}: is not a multiple of 2 x model.context_parallel_size="
            f"{context}, as each rank takes two blocks, for balance; change one",
        )
    elif model.sequence_parallel and (length // context) % tensor:
        yield Problem(
            ("model.seq_length", "model.tensor_model_parallel_size", "model.sequence_parallel"),
            f"model.seq_length={length}: on {context} context-parallel ranks is not a multiple of "
            f"model.tensor_model_parallel_size={tensor}, which model.sequence_parallel=true needs; "
            "change one",
        )
