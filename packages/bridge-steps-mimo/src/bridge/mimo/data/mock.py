"""Mock data: random images and tokens, to try and to measure a model without data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bridge.mimo.data.microbatches import Collate, count_items
from bridge.mimo.data.rank_images import make_unloaded_images, should_load_images
from bridge.mimo.data.samples import find_padding_token, make_next_token_sample
from bridge.mimo.model_config import MultimodalModelConfig
from bridge.training.config import ConfigContainer
from bridge.training.contracts import DataRequest, DataSplits

_STREAM = 2**40
"""Distance between the seeds of a sample's text and of its images."""


@dataclass(kw_only=True)
class MockDatasetConfig:
    """Samples that are a function of their index: images first, then text to the end."""

    size: int = 1_000_000
    """Training samples."""
    validation_size: int = 1024
    """Validation samples."""
    max_images: int = 1
    """The most images of a sample for each encoder; the number is random."""
    min_images: int = 1
    """The fewest images of a sample for each encoder; 0 makes some samples text alone."""
    pack: bool = False
    """Put the samples of a microbatch into one row (`bridge.mimo.data.packing.pack`)."""

    def problems(self, config: ConfigContainer) -> Iterator[str]:
        """Yield the settings that do not fit the model."""
        if self.size < 1 or self.validation_size < 0:
            yield (
                f"dataset.size={self.size} and dataset.validation_size={self.validation_size}: "
                "must be at least 1 and 0; raise them"
            )
        if not 0 <= self.min_images <= self.max_images:
            yield (
                f"dataset.min_images={self.min_images}: must be from 0 to "
                f"dataset.max_images={self.max_images}; change one of them"
            )
        model = config.model
        if not isinstance(model, MultimodalModelConfig):
            yield "dataset: this mock data is for a multimodal model; choose a recipe with one"
            return
        images = sum(encoder.tokens_per_image for encoder in model.encoders.values())
        if self.max_images * images >= model.seq_length:
            yield (
                f"dataset.max_images={self.max_images}: so many images of each encoder are "
                f"{self.max_images * images} tokens, which leave no room for text in "
                f"model.language.seq_length={model.seq_length}; lower the one or raise the other"
            )

    def build(self, request: DataRequest) -> DataSplits:
        """Build the splits."""
        model = request.config.model
        assert isinstance(model, MultimodalModelConfig)  # `problems` has checked it
        return DataSplits(
            train=_MockSamples(self, request, first=0, size=self.size),
            validation=_MockSamples(self, request, first=self.size, size=self.validation_size),
            shuffle=False,
            collate=Collate.for_model(model, pack=self.pack),
            items={"images": count_items},
        )


class _MockSamples:
    def __init__(
        self, config: MockDatasetConfig, request: DataRequest, *, first: int, size: int
    ) -> None:
        model = request.config.model
        assert isinstance(model, MultimodalModelConfig)
        self._config, self._model = config, model
        self._loaded = {name for name in model.encoders if should_load_images(request, name)}
        self._first, self._size = first, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        seed = self._first + index
        generator = torch.Generator().manual_seed(seed)
        model, config = self._model, self._config
        tokens: list[int] = []
        items = {}
        for name, encoder in model.encoders.items():
            low, high = config.min_images, config.max_images + 1
            number = int(torch.randint(low, high, (), generator=generator))
            tokens += [model.special_token_ids[name]] * (number * encoder.tokens_per_image)
            if name not in self._loaded:
                items[name] = make_unloaded_images(number)
                continue
            shape = (number, encoder.num_channels, encoder.image_size, encoder.image_size)
            # Another generator than the text's, which is then the same where no image is drawn.
            image_generator = torch.Generator().manual_seed(seed + (len(items) + 1) * _STREAM)
            items[name] = {"pixels": torch.rand(shape, generator=image_generator)}
        images, length = len(tokens), model.seq_length + 1
        special = set(model.special_token_ids.values())
        text = torch.randint(
            model.language.vocab_size, (length - images,), generator=generator
        ).tolist()
        padding = find_padding_token(special)
        tokens += [padding if token in special else token for token in text]
        return make_next_token_sample(
            tokens,
            counted=range(max(1, images), length),
            seq_length=model.seq_length,
            padding=padding,
            items=items,
        )
