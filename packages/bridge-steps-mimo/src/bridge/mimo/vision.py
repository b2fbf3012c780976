"""The image encoder of a multimodal model: a vision transformer as a modality of megatron-core."""

from typing import TYPE_CHECKING, Any, override

import torch
from torch.nn import functional

from bridge.mimo.projections import build_linear, initializer_of
from bridge.training.megatron_import import quiet_import
from bridge.training.model.initial_weights import draw_with
from bridge.training.transformer.layer_specs import encoder_block_spec
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

ENCODER = "encoder"
"""The name of a modality's encoder in megatron-core's modality submodules."""


class VisionTransformer(MegatronModule):
    """An encoder of images: patches, learned positions and a bidirectional transformer.

    It is the one of arXiv:2010.11929 without the class token, with megatron-core's layers.

    Args:
        config: The finalized transformer.
        image_size: Height and width of the images.
        patch_size: Height and width of a patch; it divides the image size.
        num_channels: Channels of the images.
        pg_collection: The process groups of this module.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        image_size: int,
        patch_size: int,
        num_channels: int,
        pg_collection: "ProcessGroupCollection",
    ) -> None:
        super().__init__(config)
        # megatron-core's checkpoints look for them.
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self.image_shape = (num_channels, image_size, image_size)
        self.patch_size = patch_size
        stage, stages = pg_collection.pp.rank(), pg_collection.pp.size()
        self.is_last_stage = stage == stages - 1
        if stage == 0:
            patches = (image_size // patch_size) ** 2
            self.patch_embedding = build_linear(config, num_channels * patch_size**2)
            self.position_embeddings = torch.nn.Parameter(torch.empty(patches, config.hidden_size))
            draw_with(self.position_embeddings, initializer_of(config))
        self.transformer = TransformerBlock(
            config,
            encoder_block_spec(config, pp_rank=stage),
            pre_process=stage == 0,
            post_process=self.is_last_stage,
            pg_collection=pg_collection,
        )

    @override
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images, or run the first pipeline stage on them.

        Args:
            pixels: [images, channels, height, width], of any type; converted to that of the
                weights.

        Returns:
            [images, patches, hidden size], the patches row by row. Before another stage
            [patches, images, hidden size], for its `forward_stage`.

        Raises:
            UsageError: The images have another shape.
        """
        if tuple(pixels.shape[1:]) != self.image_shape:
            raise UsageError(
                f"pixels have shape {tuple(pixels.shape)}, and the encoder takes images of "
                f"{self.image_shape} (channels, height, width)"
            )
        patches = _patches(pixels, self.patch_size).to(self.position_embeddings.dtype)
        embedded = self.patch_embedding(patches) + self.position_embeddings
        return self._output(
            self.transformer(embedded.transpose(0, 1).contiguous(), attention_mask=None)
        )

    def forward_stage(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run this stage on the output of the one before it; return as `forward`."""
        self.transformer.set_input_tensor(hidden_states)
        return self._output(self.transformer(hidden_states, attention_mask=None))

    def _output(self, encoded: torch.Tensor) -> torch.Tensor:
        return encoded.transpose(0, 1).contiguous() if self.is_last_stage else encoded

    def blank_inputs(self) -> dict[str, torch.Tensor]:
        """Return the arguments of `forward` for one image without content."""
        weight = self.position_embeddings
        return {"pixels": weight.new_zeros(1, *self.image_shape)}


class ImageModality(VisionModalitySubmodules):
    """An encoder and its projection: megatron-core's, but the encoder may have several stages."""

    @override
    def forward(
        self,
        encoder_inputs: dict[str, Any] | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Encode, and project on the last stage.

        Args:
            encoder_inputs: The encoder's arguments by its name, on the first stage.
            hidden_states: Output of the stage before it, on the others.

        Returns:
            [tokens, width of the language model]; the encoder's output before another stage; None
            without an input.
        """
        if hidden_states is None:
            if not encoder_inputs or self.is_last_stage:
                embedded: torch.Tensor | None = super().forward(encoder_inputs)
                return embedded
            [(name, arguments)] = encoder_inputs.items()
            passed: torch.Tensor = self.encoders[name](**arguments)
            return passed
        encoder: Any = next(iter(self.encoders.values()))
        encoded: torch.Tensor = encoder.forward_stage(hidden_states)
        if not self.is_last_stage:
            return encoded
        return self.project_embeddings([encoded.flatten(0, 1)], is_input=True)


def _patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """Cut [images, channels, height, width] into [images, patches, channels * size * size]."""
    return functional.pixel_unshuffle(images, size).flatten(2).transpose(1, 2).contiguous()
