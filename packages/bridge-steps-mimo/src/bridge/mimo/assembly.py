"""The assembly of a multimodal model from the sections of its modules."""

from collections.abc import Mapping

from bridge.mimo.model import MultimodalModel
from bridge.mimo.ranks.placement import LANGUAGE
from bridge.mimo.sections import LanguageModelConfig, ProjectionConfig, VisionEncoderConfig
from bridge.mimo.vision import ENCODER, ImageModality
from bridge.training.megatron_import import expected_messages_held_back, quiet_import

with quiet_import():
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.config.base_configs import MimoModelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec


def assemble_model(
    language: LanguageModelConfig,
    encoders: Mapping[str, VisionEncoderConfig],
    projections: Mapping[str, ProjectionConfig],
    special_token_ids: Mapping[str, int],
    groups_by_module: Mapping[str, ProcessGroupCollection],
    grids: Mapping[str, HyperCommGrid] | None = None,
) -> MultimodalModel:
    """Build the modules of this rank on the current device.

    Args:
        language: The resolved section of the language model.
        encoders: The resolved sections of the encoders, by modality.
        projections: Their projections, by modality; the default one where a modality has none.
        special_token_ids: The token at the positions of each modality's embeddings.
        groups_by_module: The process groups of each module that is on this rank, at least one.
        grids: The ranks of each module, for modules on separate ranks, of which this rank has one;
            None puts all modules on all ranks, in megatron-core's own groups.
    """
    own = next(iter(groups_by_module.values()))
    language_groups = groups_by_module.get(LANGUAGE, own)
    # A rank specifies all modules. megatron-core builds only those that are on it.
    language_spec = language.build_spec(language_groups)
    modality_specs = {
        name: _modality_spec(
            name,
            encoder,
            projections.get(name, ProjectionConfig()),
            groups_by_module.get(name, own),
            language_spec,
        )
        for name, encoder in encoders.items()
    }
    with expected_messages_held_back():
        model = MultimodalModel(
            MimoModelConfig(
                language_model_spec=language_spec,
                modality_submodules_spec=modality_specs,
                special_token_ids=dict(special_token_ids),
                module_to_grid_map=None if grids is None else dict(grids),
            ),
            language_groups,
        )
    sections = {**encoders, LANGUAGE: language}
    for name, module in model.modules_on_this_rank().items():
        sections[name].let_modules_accumulate(module)
    return model


def _modality_spec(
    name: str,
    encoder: VisionEncoderConfig,
    projection: ProjectionConfig,
    groups: ProcessGroupCollection,
    language_spec: ModuleSpec,
) -> ModuleSpec:
    projection_spec = projection.build_spec(
        language_spec.params["config"], input_size=encoder.hidden_size, pg_collection=groups
    )
    return ModuleSpec(
        module=ImageModality,
        params={"pg_collection": groups},
        submodules={
            "encoders": {ENCODER: encoder.build_spec(f"model.encoders.{name}", groups)},
            "input_projections": [projection_spec],
        },
    )
