"""The multimodal model: megatron-core's MimoModel without its host-device syncs."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, override

import torch
import torch.distributed as dist

from bridge.mimo.ranks.placement import LANGUAGE
from bridge.mimo.vision import ENCODER
from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import assert_on_device, mark_split_sizes
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.models.mimo.config.base_configs import MimoModelConfig
    from megatron.core.models.mimo.config.role import ModuleLayout
    from megatron.core.models.mimo.model.base import MimoModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import unwrap_model


class MultimodalModel(MimoModel):
    """Encoders whose outputs replace the embeddings of special tokens in a language model's input.

    It differs from megatron-core's model in three ways:

    - The embeddings are put in position without asking the device how many positions there are.
    - A wrong number of embeddings is an error on the device.
    - In training, an encoder without an input in a microbatch runs on a blank one that has no
      position in the text. Its gradients are then zeros, not absent, so all ranks reduce and gather
      in the same order, whatever their microbatches hold.

    On separate ranks this rank holds one of the modules. The caller of an encoder's last stage then
    passes the number of embeddings of each sample.

    Args:
        mimo_config: The modules' specifications.
        language_groups: The process groups of the language model. A rank without it passes those of
            its own module.
    """

    _blank: frozenset[str] = frozenset()
    """The modalities whose inputs in this pass are blank."""
    _embeddings_per_sample: Mapping[str, list[int]]

    def __init__(
        self, mimo_config: MimoModelConfig, language_groups: ProcessGroupCollection
    ) -> None:
        super().__init__(mimo_config, cp_group=language_groups.cp, tp_group=language_groups.tp)
        # megatron-core's checkpoints look for them.
        self.pg_collection, self.tp_group = language_groups, language_groups.tp

    @override
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
            labels: The tokens to predict, [batch, sequence]; None returns logits instead of losses.
            modality_inputs: ``{modality: {encoder: arguments}}``; an absent modality has no item.
            packing_kwargs: megatron-core's boundaries of packed sequences.
            embeddings_per_sample: By modality, for the last stage of an encoder on separate ranks:
                each replica of the language model gets the embeddings of its samples.

        Returns:
            The language model's output (a dict of outputs where it does not end), and the mask.
        """
        inputs = {name: given for name, given in (modality_inputs or {}).items() if given}
        if not self._is_colocated or torch.is_grad_enabled():
            blank = {name: self._blank_inputs(name) for name in self._names_to_run_blank(inputs)}
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

    @override
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

    @override
    def align_embeddings_by_token_positions(
        self,
        modality_embeddings: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: dict[str, int],
    ) -> torch.Tensor:
        """Put each modality's embeddings at the positions of its tokens, in their order.

        Args:
            modality_embeddings: "text" as `get_text_embeddings` returns it; of each modality,
                [tokens, hidden], sample after sample.
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
            is_token = input_ids == token
            embeddings = modality_embeddings.get(name)
            number = 0 if embeddings is None or name in self._blank else embeddings.shape[0]
            assert_on_device(
                is_token.sum() == number,
                f"input_ids: the number of {name!r} tokens ({token}) is not that of their "
                f"embeddings, {number}; give a token for each embedding",
            )
            if embeddings is None:
                continue
            if embeddings.shape[0] == 0:
                # The rank that sent it waits for its gradient.
                combined = combined + embeddings.sum()
                continue
            indices = is_token.flatten().cumsum(0).view_as(is_token) - 1
            aligned = embeddings[indices.clamp(0, embeddings.shape[0] - 1)].transpose(0, 1)
            combined = torch.where(is_token.t().unsqueeze(-1), aligned, combined)
        return combined.contiguous()

    def modules_on_this_rank(self) -> dict[str, torch.nn.Module]:
        """Return the language model and the modalities that this rank holds a part of, by name."""
        modules: dict[str, torch.nn.Module] = dict(self.modality_submodules.items())
        if self.language_model is not None:
            modules[LANGUAGE] = self.language_model
        return modules

    # --- modules on separate ranks

    def own_module(self) -> tuple[torch.nn.Module, TransformerConfig]:
        """Return the only module on this rank, and the config of its transformer."""
        [(name, module)] = self.modules_on_this_rank().items()
        inner: Any = unwrap_model(module)
        config = (inner if name == LANGUAGE else inner.encoders[ENCODER]).config
        return module, config

    def replace_own_module(self, wrapped: torch.nn.Module) -> None:
        """Replace the module by itself, wrapped for training."""
        [name] = self.modules_on_this_rank()
        if name == LANGUAGE:
            self.language_model = wrapped
        else:
            self.modality_submodules[name] = wrapped

    # --- checkpoints

    @override
    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the tensors of a checkpoint, whose names are the same under every placement."""
        with self._unwrapped():
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[no-untyped-call, no-any-return]

    @override
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load tensors by the names of `sharded_state_dict`."""
        with self._unwrapped():
            return super().load_state_dict(*args, **kwargs)

    @contextlib.contextmanager
    def _unwrapped(self) -> Iterator[None]:
        """Take the module on this rank out of its wrapper in this block."""
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

    @override
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
            output = self._split_by_sample(output, name)
        return {name: output}

    def _split_by_sample(self, output: torch.Tensor, name: str) -> torch.Tensor:
        """Check the number of embeddings, and record how many belong to each sample.

        The embeddings of a blank input are dropped.
        """
        numbers = self._embeddings_per_sample.get(name)
        if numbers is None:
            raise UsageError(
                f"rank {dist.get_rank()}, last stage of {name}: embeddings_per_sample is missing; "
                "bridge.training.mimo_step.forward_step counts them"
            )
        total = sum(numbers)
        if total == 0:
            # The slice is copied: megatron-core may free a tensor that was sent, but not a view.
            output = output[:0].clone()
        if output.shape[0] != total:
            raise UsageError(
                f"rank {dist.get_rank()}, last stage of {name}: a microbatch has {total} tokens "
                f"model.special_token_ids.{name}={self.special_token_ids[name]} and "
                f"{output.shape[0]} embeddings; give a token for each embedding"
            )
        # The bridge divides the output by them over the replicas of the language model.
        mark_split_sizes(output, numbers)
        return output

    def _names_to_run_blank(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Yield the modalities on this rank that have no input and run on a blank one.

        Of colocated modalities only those run that are trained. On separate ranks all run: the
        language model waits for their embeddings, even for none.
        """
        for name, modality in self.modality_submodules.items():
            if name in inputs or not self.role.is_first_stage(name):
                continue
            if not self._is_colocated or any(p.requires_grad for p in modality.parameters()):
                yield name

    def _blank_inputs(self, name: str) -> dict[str, Any]:
        modality: Any = unwrap_model(self.modality_submodules[name])
        return {key: encoder.blank_inputs() for key, encoder in modality.encoders.items()}
