"""The model section of GPT models, which builds the model."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, override

from bridge.training.megatron_import import expected_messages_held_back, quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.gpt.data.tokenization.tokenizers import tokenizer_vocab_size
    from bridge.gpt.families import find_family
    from bridge.gpt.layer_specs import mtp_block_spec
    from bridge.gpt.model import GPT
    from bridge.training.config import ConfigContainer, Problem
    from bridge.training.config.model_identity import model_field
    from bridge.training.contracts import ExportedWeight
    from bridge.training.transformer.language_model_section import LanguageModelSection

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(kw_only=True)
class GPTModelConfig(LanguageModelSection):
    """A GPT model: a transformer with vocabulary and positions."""

    rope_scaling: bool = model_field("extensible", default=False)
    """Stretch the rotary embedding's long wavelengths as Llama 3.1 does."""
    rope_scaling_factor: float = model_field("extensible", default=8.0)
    """By how much rope_scaling stretches."""
    hf_files: dict[str, str] | None = model_field("extensible", default=None)
    """Content of the Hugging Face folder that the model was imported from: the JSON of
    config.json and generation_config.json, for `bridge export`; not to be set by hand."""

    @property
    def query_groups(self) -> int:
        """Number of key and value heads: num_query_groups, or its default."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of an attention head: kv_channels, or its default."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        """Width of a dense layer's MLP: ffn_hidden_size, or its default."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @override
    def __getstate__(self) -> dict[str, Any]:
        # The shared config holds the hooks of a running model, so it is neither copied nor saved.
        return {name: value for name, value in vars(self).items() if name != "_shared"}

    def open_fields(
        self, config: ConfigContainer, *, device: Literal["cuda", "cpu"]
    ) -> dict[str, Any]:
        """Return the value that each field takes where it was left at its default.

        `bridge.training.config.resolve` calls this and writes the values into the resolved
        configuration; nothing is changed here. ``vocab_size`` is missing while it is unknown.

        Args:
            config: The run's configuration, of which this is the model section.
            device: Where the run will take place.
        """
        values = self.device_defaults(device)
        if config.tokenizer is not None:
            with contextlib.suppress(UsageError):  # `problems` says what is wrong with it
                values["vocab_size"] = tokenizer_vocab_size(config.tokenizer)
        return values

    def build(
        self,
        pg_collection: "ProcessGroupCollection",
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> GPT:
        """Build one model chunk on the current device (see `contracts.ModelConfig.build`).

        Raises:
            UsageError: ``vocab_size`` or ``layer_spec`` is still open.
        """
        self.reject_open_layer_spec("model")
        config = self._chunks_config(vp_stage)
        # megatron-core takes block specs too, which its annotations do not say.
        mtp: Any = mtp_block_spec(config, vp_stage=vp_stage, pp_rank=pg_collection.pp.rank())
        with expected_messages_held_back():
            model = GPT(
                **self.gpt_arguments(
                    config,
                    pg_collection,
                    pre_process=pre_process,
                    post_process=post_process,
                    vp_stage=vp_stage,
                ),
                rope_scaling=self.rope_scaling,
                rope_scaling_factor=self.rope_scaling_factor,
                mtp_block_spec=mtp,
            )
        self.let_modules_accumulate(model)
        return model

    def training_flops_per_token(self) -> float:
        """Return the FLOPs of forward and backward for one token, without recomputation.

        With w the weights that a token is multiplied with (its experts and the output layer, not
        the embedding), n layers, s tokens of a sample, and d the heads times their width, it is

            6 w + 6 n s d

        The second term is the causal half of the attention matrices (PaLM, arXiv:2204.02311,
        appendix B).
        """
        matrices = self.seq_length * self.num_attention_heads * self.head_width
        layers = self.num_layers + (self.mtp_num_layers or 0)
        return 6.0 * (self._weights_per_token() + layers * matrices)

    def weight_gradient_flops_per_token(self) -> float:
        """Return the FLOPs of `training_flops_per_token` that a frozen model saves."""
        return 2.0 * self._weights_per_token()

    def _weights_per_token(self) -> int:
        """Return the number of weights that a token is multiplied with."""
        heads = self.num_attention_heads + self.query_groups
        attention = 2 * self.hidden_size * self.head_width * heads
        layers = [attention + self._mlp_weights(is_moe) for is_moe in self._moe_pattern()]
        logits = self.hidden_size * self.padded_vocab_size
        one_more_token = 2 * self.hidden_size**2 + layers[-1] + logits
        return sum(layers) + logits + (self.mtp_num_layers or 0) * one_more_token

    def exported_weights(self) -> Mapping[str, ExportedWeight]:
        """Return the weights as the model's family shares them (see `contracts.NamesWeights`).

        Raises:
            UsageError: The model belongs to no family; the message names the fields.
        """
        return find_family(self).exported_weights(self)

    def problems(self, config: ConfigContainer) -> Iterator[str | Problem]:
        """Yield what megatron-core would reject only while it builds, or would not notice."""
        yield from self.language_model_problems("model")
        yield from self._tokenizer_problems(config)
        yield from self.feature_problems("model", config)
        if self.mtp_num_layers and self.position_embedding_type == "learned_absolute":
            yield (
                "model.mtp_num_layers: multi-token prediction needs "
                "model.position_embedding_type=rope or none, not learned_absolute"
            )

    def _tokenizer_problems(self, config: ConfigContainer) -> Iterator[str]:
        if config.tokenizer is None:
            if self.vocab_size is None:
                yield (
                    "model.vocab_size: None, and there is no tokenizer to take it from; give "
                    "model.vocab_size or a tokenizer section"
                )
            return
        try:
            tokens = tokenizer_vocab_size(config.tokenizer)
        except UsageError as error:
            yield str(error)
            return
        if self.vocab_size is not None and tokens > self.vocab_size:
            yield (
                f"model.vocab_size: {self.vocab_size} is smaller than the tokenizer's {tokens} "
                "tokens; raise it or leave it out"
            )

    def _chunks_config(self, vp_stage: int | None) -> TransformerConfig:
        """Return one config for all chunks of a rank, as schedules set their hooks on it once."""
        if vp_stage is None or vp_stage == 0:
            self._shared = self.finalized()
        return self._shared

    def _moe_pattern(self) -> list[bool]:
        if self.num_moe_experts is None:
            return [False] * self.num_layers
        frequency = self.moe_layer_freq
        if isinstance(frequency, int):
            return [layer % frequency == 0 for layer in range(self.num_layers)]
        return [bool(is_moe) for is_moe in frequency]

    def _mlp_weights(self, is_moe: bool) -> int:
        """Return the number of weights of a layer's MLP that a token is multiplied with."""
        matrices = 3 if self.gated_linear_unit else 2
        if not is_moe:
            return matrices * self.hidden_size * self.mlp_width
        experts, shared = self.num_moe_experts or 0, self.moe_shared_expert_intermediate_size or 0
        active = self.moe_router_topk * (self.moe_ffn_hidden_size or self.mlp_width) + shared
        return self.hidden_size * (matrices * active + experts)
