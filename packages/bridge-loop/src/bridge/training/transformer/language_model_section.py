"""A language model in a run's configuration: a transformer with a vocabulary and positions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, override

from bridge.training.config.model_identity import model_field
from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.training.transformer.layer_specs import decoder_block_spec
    from bridge.training.transformer.section import TransformerSection

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(kw_only=True)
class LanguageModelSection(TransformerSection):
    """The settings that all models built of megatron-core's GPTModel share."""

    vocab_size: int | None = None
    """Number of tokens; the tokenizer's if None."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, the same under every parallel layout
    (unless tensor_model_parallel_size does not divide it)."""
    seq_length: int = model_field("extensible", default=1024)
    """Tokens of a sample; also the number of learned positions."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """The kind of position embedding."""
    rotary_base: int = model_field("extensible", default=10000)
    """Base period of the rotary embedding."""
    rotary_percent: float = 1.0
    """Part of each head's channels that is rotated."""
    share_embeddings_and_output_weights: bool = False
    """Use the token embedding as the output layer's weight."""

    @property
    @override
    def has_rotary_positions(self) -> bool:
        """Whether the positions are rotary embeddings."""
        return self.position_embedding_type == "rope"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size and the padding."""
        if self.vocab_size is None:
            raise UsageError(
                "model.vocab_size=null: the size of the vocabulary is not known; give it, or a "
                "tokenizer section to take it from"
            )
        multiple = math.lcm(self.make_vocab_size_divisible_by, self.tensor_model_parallel_size)
        return math.ceil(self.vocab_size / multiple) * multiple

    def gpt_arguments(
        self,
        config: TransformerConfig,
        pg_collection: "ProcessGroupCollection",
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of megatron-core's GPTModel for one model chunk.

        Args:
            config: The finalized transformer.
            pg_collection: The process groups of the model.
            pre_process: Whether the chunk has the embedding.
            post_process: Whether the chunk has the output layer.
            vp_stage: The chunk's virtual pipeline stage; None without virtual stages.
        """
        return {
            "config": config,
            "transformer_layer_spec": decoder_block_spec(
                config, vp_stage=vp_stage, pp_rank=pg_collection.pp.rank()
            ),
            "vocab_size": self.padded_vocab_size,
            "max_sequence_length": self.seq_length,
            "pre_process": pre_process,
            "post_process": post_process,
            "parallel_output": True,
            "share_embeddings_and_output_weights": self.share_embeddings_and_output_weights,
            "position_embedding_type": self.position_embedding_type,
            "rotary_percent": self.rotary_percent,
            "rotary_base": self.rotary_base,
            "pg_collection": pg_collection,
            "vp_stage": vp_stage,
        }

    def language_model_problems(self, path: str) -> Iterator[str]:
        """Yield the mistakes in vocabulary and positions.

        Args:
            path: Path of the section, such as "model".
        """
        if self.make_vocab_size_divisible_by < 1:
            yield (
                f"{path}.make_vocab_size_divisible_by={self.make_vocab_size_divisible_by}: must be "
                "at least 1; raise it"
            )
        if self.kv_channels and self.kv_channels % 2 and self.has_rotary_positions:
            yield (
                f"{path}.kv_channels={self.kv_channels}: a rotary embedding turns pairs of "
                f"channels; take an even number, or {path}.position_embedding_type=none"
            )
