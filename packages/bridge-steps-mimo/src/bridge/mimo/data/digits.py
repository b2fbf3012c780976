"""Handwritten digits, each with the question which digit it is.

The images are scikit-learn's: 1,797 real ones of 8 x 8 pixels, bundled with it (Alpaydin and
Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998). Every fifth image in the order of
the file, from the first on, is held out for validation: 360 images. The other 1,437 are trained on.
A classifier by the three nearest neighbors, in distance of pixels, is right on 98.3 % of the 360.

A sample is ``image tokens, QUESTION, answer``. The answer is the digit's token, and only its
prediction counts in the loss.
"""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from bridge.mimo.data.microbatches import Collate, count_items
from bridge.mimo.data.rank_images import make_unloaded_images, should_load_images
from bridge.mimo.data.samples import make_next_token_sample
from bridge.mimo.model_config import MultimodalModelConfig
from bridge.training.config import ConfigContainer
from bridge.training.contracts import DataRequest, DataSplits

QUESTION = 10
IMAGE = 11
PADDING = 12
VOCABULARY = 13
"""Number of tokens; 0 to 9 are the digits."""

HELD_OUT = slice(None, None, 5)
"""The images that are held out."""
IMAGE_SIZE = 8
OUTSIDE = -4.88 / 6.02
"""The value of pixels from outside a turned or moved image; a blank pixel within it is 0."""


@dataclass(kw_only=True)
class DigitsDatasetConfig:
    """scikit-learn's digits for a model with an encoder of 8 x 8 grey images."""

    modality: str = "vision"
    """The encoder of the images."""
    views: int = 32
    """Training samples that are made of each image: the image itself, and copies of it that are
    turned, scaled and moved a little, each differently."""

    def problems(self, config: ConfigContainer) -> Iterator[str]:
        """Yield the reasons why the model cannot read the digits."""
        if importlib.util.find_spec("sklearn") is None:
            yield (
                "dataset: the digits come with scikit-learn, which is not installed; install it "
                "with the extra bridge-steps-mimo[digits] (pip install --find-links DIST "
                "'bridge-steps-mimo[digits]', from the folder of wheels)"
            )
        model = config.model
        if not isinstance(model, MultimodalModelConfig) or self.modality not in model.encoders:
            yield (
                f"dataset.modality={self.modality}: is no encoder of the model; take a multimodal "
                "model with an encoder of that name"
            )
            return
        encoder, path = model.encoders[self.modality], f"model.encoders.{self.modality}"
        for name, wanted in (("image_size", IMAGE_SIZE), ("num_channels", 1)):
            if (value := getattr(encoder, name)) != wanted:
                yield f"{path}.{name}={value}: that of the digits is {wanted}; set it"
        needed = encoder.tokens_per_image + 1
        if model.seq_length < needed:
            yield (
                f"model.language.seq_length={model.seq_length}: is less than the {needed} tokens "
                "of an image and its question; raise it"
            )
        if model.language.vocab_size < VOCABULARY:
            yield (
                f"model.language.vocab_size={model.language.vocab_size}: is less than the digits' "
                f"{VOCABULARY} tokens; raise it"
            )
        token = model.special_token_ids.get(self.modality)
        if token != IMAGE:
            yield (
                f"model.special_token_ids.{self.modality}={token}: the token for the digits' "
                f"images is {IMAGE}; give that"
            )

    def build(self, request: DataRequest) -> DataSplits:
        """Build the splits."""
        model = request.config.model
        assert isinstance(model, MultimodalModelConfig)  # `problems` has checked it
        images, digits = load_digits()
        trained = torch.ones(len(digits), dtype=torch.bool)
        trained[HELD_OUT] = False
        options: dict[str, Any] = {
            "modality": self.modality,
            "with_images": should_load_images(request, self.modality),
        }
        return DataSplits(
            train=DigitSamples(
                images[trained], digits[trained], model, views=self.views, **options
            ),
            validation=DigitSamples(images[~trained], digits[~trained], model, **options),
            collate=Collate.for_model(model),
            items={"images": count_items},
            notes={"images": int(trained.sum()), "held-out images": int((~trained).sum())},
        )


class DigitSamples:
    """Samples of images: all of them as they are, then all in another view, and so on.

    Args:
        images: [images, 1, 8, 8].
        digits: Their labels, [images].
        model: The model that reads them.
        modality: The encoder of the images.
        views: Samples of each image.
        with_images: Whether this rank loads the images.
    """

    def __init__(
        self,
        images: torch.Tensor,
        digits: torch.Tensor,
        model: MultimodalModelConfig,
        *,
        modality: str,
        views: int = 1,
        with_images: bool = True,
    ) -> None:
        self._with_images = with_images
        self._images, self._digits = images, digits.tolist()
        self._model, self._modality, self._views = model, modality, views

    def __len__(self) -> int:
        return len(self._digits) * self._views

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        view, number = divmod(index, len(self._digits))
        image = self._images[number] if self._with_images else None
        if image is not None and view > 0:
            image = _distort(image, torch.Generator().manual_seed(index))
        pixels = make_unloaded_images(1) if image is None else {"pixels": image[None]}
        tokens = [IMAGE] * self._model.encoders[self._modality].tokens_per_image
        return make_next_token_sample(
            [*tokens, QUESTION, self._digits[number]],
            counted=[len(tokens) + 1],
            seq_length=self._model.seq_length,
            padding=PADDING,
            items={self._modality: pixels},
        )


def _distort(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn an image by up to 12 degrees, scale it by up to a tenth, move it by up to a pixel."""
    turn, scale, down, right = (2 * torch.rand(4, generator=generator) - 1).tolist()
    angle, scale = turn * math.radians(12), 1 + 0.1 * scale
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    pixel = 2 / image.shape[-1]  # the grid goes from -1 to 1
    affine = torch.tensor([[[cosine, -sine, right * pixel], [sine, cosine, down * pixel]]])
    grid = functional.affine_grid(affine, [1, *image.shape], align_corners=False)
    # grid_sample takes 0 for pixels from outside the image.
    moved = functional.grid_sample(image[None] - OUTSIDE, grid, align_corners=False)
    return moved[0] + OUTSIDE


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, [1797, 1, 8, 8] with ink from 0 to 1, and their digits, [1797].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn import datasets  # type: ignore[import-untyped]

    bundle: Any = datasets.load_digits()
    images = torch.tensor(bundle.images, dtype=torch.float32) / 16
    return images.unsqueeze(1), torch.tensor(bundle.target)
