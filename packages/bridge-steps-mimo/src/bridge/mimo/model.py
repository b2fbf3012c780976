"""The multimodal model: megatron-core's, with embeddings placed without waiting for the device."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from bridge.mimo.sections import ProjectionConfig
from bridge.training.megatron_import import expected_messages_held_back, quiet_import

with quiet_import():
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.config.base_configs import MimoModelConfig
    from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, ModuleLayout
    from megatron.core.models.mimo.model.base import MimoModel
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.utils import unwrap_model

if TYPE_CHECKING:
    from bridge.mimo.model_config import MultimodalModelConfig

LANGUAGE = MIMO_LANGUAGE_MODULE_KEY
"""The name of the language model among the modules."""

ENCODER = "encoder"
"""The name under which a modality's encoder takes its inputs."""


class MultimodalModel(MimoModel):
    """Encoders whose outputs take the places of special tokens in a language model's input.

    megatron-core's, but for three things. The embeddings are put in their places without asking
    the device how many places there are. A wrong number of them is an error on the device.
    And in training, where all modules are on all ranks, an encoder of which a microbatch has no
    input is run on a blank one that has no place: its gradients are then zeros, not absent, and
    the ranks reduce and gather in one order, whatever their microbatches hold.
    """

    pg_collection: Any
    """The process groups of the language model on this rank, or of its only module."""
    tp_group: Any
    """Its tensor-parallel group, where megatron-core's checkpoints look for it."""

    _blank: frozenset[str] = frozenset()
    """The modalities whose inputs in this pass are blank."""

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modality_inputs: dict[str, dict[str, Any]] | None = None,
        packing_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Run the modules of this rank.

        Args:
            input_ids: Tokens, [batch, sequence], with a special token for each embedding.
            position_ids: Positions, [batch, sequence].
            attention_mask: None: the language model is causal.
            loss_mask: Returned as it is, or cut as the sequence is.
            labels: The tokens to predict, [batch, sequence]; None for logits in place of losses.
            modality_inputs: ``{modality: {encoder: arguments}}``; an absent modality has no item.
            packing_kwargs: megatron-core's boundaries of packed sequences.

        Returns:
            The language model's output (a dict of outputs where it does not end), and the mask.
        """
        inputs = {name: given for name, given in (modality_inputs or {}).items() if given}
        if self.role.mode is ModuleLayout.COLOCATED and torch.is_grad_enabled():
            blank = {name: self._blank_inputs(name) for name in self._trained_without(inputs)}
            self._blank = frozenset(blank)
            inputs |= blank
        try:
            output: tuple[Any, torch.Tensor | None] = super().forward(
                input_ids,
                position_ids,
                attention_mask,
                loss_mask,
                labels,
                inputs or None,
                packing_kwargs,
            )
            return output
        finally:
            self._blank = frozenset()

    def get_text_embeddings(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        special_token_ids: dict[str, int],
    ) -> torch.Tensor:
        """Embed every position, [sequence, batch, hidden]; those of special tokens are overwritten.

        Args:
            input_ids: [batch, sequence].
            position_ids: [batch, sequence].
            special_token_ids: By modality; they need not be in the vocabulary.
        """
        special = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in special_token_ids.values():
            special |= input_ids == token
        embedding = unwrap_model(self.language_model).embedding
        embedded: torch.Tensor = embedding(
            input_ids=input_ids.masked_fill(special, 0), position_ids=position_ids
        )
        return embedded

    def align_embeddings_by_token_positions(
        self,
        modality_embeddings: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: dict[str, int],
    ) -> torch.Tensor:
        """Put each modality's embeddings in the places of its tokens, in their order.

        Args:
            modality_embeddings: "text" as `get_text_embeddings` returns it; of each modality,
                [tokens, hidden], those of all samples one after the other.
            input_ids: [batch, sequence].
            special_token_ids: By modality.

        Returns:
            [sequence, batch, hidden].

        Raises:
            RuntimeError: A modality has more or fewer embeddings than tokens; on a GPU it is an
                assertion on the device.
        """
        combined = modality_embeddings["text"]
        for name, token in special_token_ids.items():
            places = input_ids == token
            embeddings = modality_embeddings.get(name)
            if embeddings is None or name in self._blank:
                number = 0
            else:
                number = embeddings.shape[0]
            torch._assert_async(
                places.sum() == number,
                f"input_ids: the number of {name!r} tokens ({token}) is not that of their "
                f"embeddings, {number}; give a token for each embedding",
            )
            if embeddings is None:
                continue
            if embeddings.shape[0] == 0:
                # Whoever sent it waits for its gradient.
                combined = combined + embeddings.sum()
                continue
            order = places.flatten().cumsum(0).view_as(places) - 1
            placed = embeddings[order.clamp(0, embeddings.shape[0] - 1)].transpose(0, 1)
            combined = torch.where(places.t().unsqueeze(-1), placed, combined)
        return combined.contiguous()

    def modules_on_this_rank(self) -> dict[str, torch.nn.Module]:
        """Return the language model and the modalities that this rank holds a part of, by name."""
        modules: dict[str, torch.nn.Module] = dict(self.modality_submodules.items())
        if self.language_model is not None:
            modules[LANGUAGE] = self.language_model
        return modules

    def _trained_without(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Yield the modalities on this rank that are trained and of which there is no item."""
        for name, modality in self.modality_submodules.items():
            if name not in inputs and any(p.requires_grad for p in modality.parameters()):
                yield name

    def _blank_inputs(self, name: str) -> dict[str, Any]:
        modality: Any = self.modality_submodules[name]
        return {key: encoder.blank_inputs() for key, encoder in modality.encoders.items()}


def build_mimo(
    model_config: "MultimodalModelConfig",
    groups_by_module: Mapping[str, ProcessGroupCollection],
    grids: Mapping[str, HyperCommGrid] | None = None,
) -> MultimodalModel:
    """Build the modules of this rank on the current device.

    Args:
        model_config: A resolved section.
        groups_by_module: The process groups of each module that is on this rank, at least one.
        grids: Where each module's ranks lie, for modules on separate ranks; None puts all modules
            on all ranks, in megatron-core's own groups.
    """
    own = next(iter(groups_by_module.values()))
    language_groups = groups_by_module.get(LANGUAGE, own)
    # A rank without a module describes it all the same; megatron-core then does not build it.
    language = model_config.language.spec(language_groups)
    modalities = {
        name: _modality(model_config, name, groups_by_module.get(name, own), language)
        for name in model_config.encoders
    }
    with expected_messages_held_back():
        model = MultimodalModel(
            MimoModelConfig(
                language_model_spec=language,
                modality_submodules_spec=modalities,
                special_token_ids=dict(model_config.special_token_ids),
                module_to_grid_map=None if grids is None else dict(grids),
            ),
            cp_group=language_groups.cp,
            tp_group=language_groups.tp,
        )
    model.pg_collection, model.tp_group = language_groups, language_groups.tp
    for name, parameter in model.named_parameters():
        if model_config.is_frozen(name):
            parameter.requires_grad_(False)
    sections = {**model_config.encoders, LANGUAGE: model_config.language}
    for name, module in model.modules_on_this_rank().items():
        sections[name].let_modules_accumulate(module)
    return model


def _modality(
    model_config: "MultimodalModelConfig",
    name: str,
    groups: ProcessGroupCollection,
    language: ModuleSpec,
) -> ModuleSpec:
    encoder = model_config.encoders[name]
    projection = model_config.projections.get(name, ProjectionConfig())
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": groups},
        submodules={
            "encoders": {ENCODER: encoder.spec(f"model.encoders.{name}", groups)},
            "input_projections": [
                projection.spec(
                    language.params["config"],
                    input_size=encoder.hidden_size,
                    pg_collection=groups,
                )
            ],
        },
    )
