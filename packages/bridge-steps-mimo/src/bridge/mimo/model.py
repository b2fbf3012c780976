"""The multimodal model: megatron-core's, with embeddings placed without waiting for the device."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from bridge.mimo.modules import ImageModality
from bridge.mimo.placement import LANGUAGE
from bridge.mimo.sections import ProjectionConfig
from bridge.training.megatron_import import expected_messages_held_back, quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.config.base_configs import MimoModelConfig
    from megatron.core.models.mimo.config.role import ModuleLayout
    from megatron.core.models.mimo.model.base import MimoModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.utils import unwrap_model

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.mimo.model_config import MultimodalModelConfig

ENCODER = "encoder"
"""The name under which a modality's encoder takes its inputs."""


class MultimodalModel(MimoModel):
    """Encoders whose outputs take the places of special tokens in a language model's input.

    megatron-core's, but for three things. The embeddings are put in their places without asking
    the device how many places there are. A wrong number of them is an error on the device.
    And in training an encoder of which a microbatch has no input is run on a blank one that has no
    place: its gradients are then zeros, not absent, and the ranks reduce and gather in one order,
    whatever their microbatches hold.

    Where modules are on ranks of their own, this rank holds one, and whoever calls the last stage
    of an encoder says how many embeddings are each sample's.
    """

    pg_collection: Any
    """The process groups of the language model on this rank, or of its only module."""
    tp_group: Any
    """Its tensor-parallel group, where megatron-core's checkpoints look for it."""

    _blank: frozenset[str] = frozenset()
    """The modalities whose inputs in this pass are blank."""
    _embeddings_per_sample: Mapping[str, list[int]]
    _configs: Mapping[str, "TransformerConfig"]
    """Of each module, by its name."""

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modality_inputs: dict[str, dict[str, Any]] | None = None,
        packing_kwargs: dict[str, Any] | None = None,
        embeddings_per_sample: Mapping[str, list[int]] | None = None,
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
            embeddings_per_sample: By modality, for the last stage of an encoder on ranks of its
                own: each copy of the language model gets those of its samples.

        Returns:
            The language model's output (a dict of outputs where it does not end), and the mask.
        """
        inputs = {name: given for name, given in (modality_inputs or {}).items() if given}
        if not self._is_colocated or torch.is_grad_enabled():
            blank = {name: self._blank_inputs(name) for name in self._to_run_without(inputs)}
            self._blank = frozenset(blank)
            inputs |= blank
        self._embeddings_per_sample = embeddings_per_sample or {}
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

    # --- what the loop asks where each module is on ranks of its own (bridge.training.contracts)

    def own_module(self) -> tuple[torch.nn.Module, "TransformerConfig"]:
        """Return the only module on this rank, and its config."""
        [(name, module)] = self.modules_on_this_rank().items()
        return module, self._configs[name]

    def replace_own_module(self, wrapped: torch.nn.Module) -> None:
        """Put the module, wrapped for training, in its place."""
        [name] = self.modules_on_this_rank()
        if name == LANGUAGE:
            self.language_model = wrapped
        else:
            self.modality_submodules[name] = wrapped

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return what a checkpoint holds; names do not tell how the modules are placed."""
        with self._unwrapped():
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[no-untyped-call, no-any-return]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Take what `sharded_state_dict` names."""
        with self._unwrapped():
            return super().load_state_dict(*args, **kwargs)

    @contextlib.contextmanager
    def _unwrapped(self) -> Iterator[None]:
        """Take the module on this rank out of its wrapper for a while."""
        if self._is_colocated:
            yield
            return
        wrapped, _ = self.own_module()
        self.replace_own_module(unwrap_model(wrapped))
        try:
            yield
        finally:
            self.replace_own_module(wrapped)

    # --- encoders

    @property
    def _is_colocated(self) -> bool:
        return bool(self.role.mode is ModuleLayout.COLOCATED)

    def _forward_encoders(
        self,
        input_ids: torch.Tensor | None,
        modality_inputs: dict[str, dict[str, Any]] | None,
        input_tensors: dict[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """Run the stage of the encoder that is on this rank."""
        [name] = self.role.modality_module_names
        output: torch.Tensor = self.modality_submodules[name](
            encoder_inputs=(modality_inputs or {}).get(name),
            hidden_states=(input_tensors or {}).get(name),
        )
        if self.role.is_last_stage(name):
            output = self._for_samples(output, name)
        return {name: output}

    def _for_samples(self, output: torch.Tensor, name: str) -> torch.Tensor:
        """Check the number of embeddings, and mark which sample's they are; none of a blank one."""
        numbers = self._embeddings_per_sample.get(name)
        if numbers is None:
            raise UsageError(
                f"rank {dist.get_rank()}, last stage of {name}: embeddings_per_sample is missing; "
                "bridge.training.mimo_step.forward_step counts them"
            )
        total = sum(numbers)
        if total == 0:
            # The slice is copied: megatron-core may free what was sent, but not a view.
            output = output[:0].clone()
        if output.shape[0] != total:
            raise UsageError(
                f"rank {dist.get_rank()}, last stage of {name}: a microbatch has {total} tokens "
                f"that stand for embeddings and {output.shape[0]} embeddings; give a token "
                f"(model.special_token_ids.{name}={self.special_token_ids[name]}) for each"
            )
        # Where megatron-core looks, to divide them over the copies of the language model.
        output._mimo_bridge_split_sizes = numbers  # type: ignore[attr-defined]
        return output

    def _to_run_without(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Yield the modalities on this rank that are run without an item.

        They are those that are trained, and on ranks of their own all of them: the language model
        waits for their embeddings, if only for none.
        """
        for name, modality in self.modality_submodules.items():
            if name in inputs or not self.role.is_first_stage(name):
                continue
            if not self._is_colocated or any(p.requires_grad for p in modality.parameters()):
                yield name

    def _blank_inputs(self, name: str) -> dict[str, Any]:
        modality: Any = unwrap_model(self.modality_submodules[name])
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
        grids: Where each module's ranks lie, for modules on separate ranks, of which this rank has
            one; None puts all modules on all ranks, in megatron-core's own groups.
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
    model._configs = {
        LANGUAGE: language.params["config"],
        **{
            name: spec.submodules["encoders"][ENCODER].params["config"]  # type: ignore[index]
            for name, spec in modalities.items()
        },
    }
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
        module=ImageModality,
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
