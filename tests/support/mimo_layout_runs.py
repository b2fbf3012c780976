"""Layouts of a tiny multimodal model, and its first steps under each."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from megatron.core.optimizer import OptimizerConfig

from bridge.mimo.data.microbatches import count_items
from bridge.mimo.sections import ModuleParallelism
from bridge.training.config import ConfigContainer, TrainConfig
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.mimo_step import forward_step
from mimo_models import microbatch, mimo_run, sample, tiny_mimo
from training_runs import a_run, one_step
from unsharded_gradients import Gradients, unsharded_gradients

MICRO_BATCH, GLOBAL_BATCH = 4, 16

MIXED = [1, 2, 0, 0, 0, 0, 0, 0, 2, 0, 1, 1, 0, 0, 0, 2]
"""Numbers of images: in samples, in microbatches and in parts of microbatches of all kinds."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The parallel sizes of a module."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def name(self) -> str:
        sizes = (("DP", self.data), ("TP", self.tensor), ("PP", self.pipeline))
        return " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "1"

    def parallelism(self) -> ModuleParallelism:
        return ModuleParallelism(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            data_parallel_size=self.data,
        )


@dataclass(frozen=True, kw_only=True)
class MimoLayout:
    """Modules on separate ranks; without vision sizes all modules are on all ranks."""

    language: Sizes
    vision: Sizes | None = None

    @property
    def ranks(self) -> int:
        return self.language.ranks + (self.vision.ranks if self.vision else 0)

    @property
    def name(self) -> str:
        if self.vision is None:
            return f"colocated {self.language.name}"
        return f"vision {self.vision.name}, language {self.language.name}"

    def fields(self) -> dict[str, Any]:
        """Return the fields of a model section that ask for it."""
        if self.vision is None:
            language = ModuleParallelism(tensor_model_parallel_size=self.language.tensor)
            return {"parallelism": {"language": language}}
        modules = {"vision": self.vision, "language": self.language}
        return {
            "placement": "separate",
            "parallelism": {name: sizes.parallelism() for name, sizes in modules.items()},
        }


ALONE = MimoLayout(language=Sizes())


def _matrix() -> Iterator[MimoLayout]:
    """Yield layouts of data-parallel replicas alone, then of modules that are split as well."""
    for replicas in (1, 2):
        yield MimoLayout(language=Sizes(data=replicas))
    yield MimoLayout(language=Sizes(tensor=2))
    for encoders, replicas in product((1, 2, 4), (1, 2)):
        yield MimoLayout(vision=Sizes(data=encoders), language=Sizes(data=replicas))
    for vision, language in (
        (Sizes(tensor=2), Sizes()),
        (Sizes(), Sizes(tensor=2)),
        (Sizes(tensor=2), Sizes(tensor=2)),
        (Sizes(pipeline=2), Sizes()),
        (Sizes(), Sizes(pipeline=2)),
        (Sizes(pipeline=2), Sizes(pipeline=2)),
        (Sizes(tensor=2), Sizes(pipeline=2)),
        (Sizes(pipeline=2, data=2), Sizes(data=1)),
        (Sizes(pipeline=2), Sizes(data=2)),
        (Sizes(data=2), Sizes(tensor=2)),
        (Sizes(data=2), Sizes(pipeline=2, data=2)),
        (Sizes(tensor=2), Sizes(tensor=2, data=2)),
        (Sizes(tensor=2, data=2), Sizes(tensor=2)),
    ):
        yield MimoLayout(vision=vision, language=language)


MATRIX = tuple(_matrix())
"""The layouts that tools/mimo_layouts.py tries."""


@dataclass
class Chosen:
    """A dataset whose samples have given numbers of images, and 4 tokens of text or more."""

    images: list[int]
    validation: int = 0
    """The number of first samples that are validation data too."""
    numbered: bool = False
    """Whether the position ids of a sample are its number."""
    pack: bool = False

    def build(self, request: DataRequest) -> DataSplits:
        samples = [sample(n, 4 + (i % 4) * (n == 0), seed=i) for i, n in enumerate(self.images)]
        if self.numbered:
            for number, numbered in enumerate(samples):
                numbered["position_ids"] = numbered["position_ids"] * 0 + number
        return DataSplits(
            train=samples,
            validation=samples[: self.validation],
            shuffle=False,
            collate=lambda batch: microbatch(*batch, pack=self.pack),
            items={"images": count_items},
        )


def run_in_layout(
    directory: Path,
    layout: MimoLayout,
    normalization: Literal["token", "microbatch"] = "token",
    **model: Any,
) -> ConfigContainer:
    """Return a run whose samples have the images of `MIXED`; `model` are fields of the model."""
    return mimo_run(
        directory,
        tiny_mimo(**(layout.fields() | model)),
        dataset=Chosen(MIXED),
        train=TrainConfig(
            train_iters=3,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=MICRO_BATCH,
            loss_normalization=normalization,
        ),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, weight_decay=0.1, clip_grad=0.5),
    )


@dataclass(kw_only=True)
class Steps:
    """Losses, gradient norms and gradients of some steps."""

    losses: list[float]
    grad_norms: list[float]
    gradients: Gradients
    """Of the first step, reduced over the ranks and not clipped."""


def train_steps(config: ConfigContainer, steps: int = 3) -> Steps:
    """Train on this rank and return what the steps found."""
    gradients: list[Gradients] = []

    def keep() -> None:
        if not gradients:
            gradients.append(
                unsharded_gradients(
                    run.parts.model, run.parts.ranks.model.groups, lambda weight: weight.main_grad
                )
            )

    found = Steps(losses=[], grad_norms=[], gradients={})
    with a_run(config, forward_step) as run:
        for _ in range(steps):
            result = one_step(run, reducer=run.parts.reducer, before_optimizer_step=keep)
            found.losses.append(result.metrics["lm loss"] or 0.0)
            found.grad_norms.append(float(result.grad_norm or 0.0))
    [found.gradients] = gradients
    return found


@dataclass(frozen=True, kw_only=True)
class Deviations:
    """The deviation of some steps from those of one process."""

    loss: float
    grad_norm: float
    encoder: float
    """Largest difference of a gradient, as a part of the largest gradient of the encoder."""
    language: float


def deviations(found: Steps, alone: Steps) -> Deviations:
    """Compare steps with those of one process."""
    assert found.gradients.keys() == alone.gradients.keys()

    def of_gradients(prefix: str) -> float:
        names = [name for name in alone.gradients if name.startswith(prefix)]
        largest = max(float(alone.gradients[name].abs().max()) for name in names)
        # Rows that only pad a vocabulary are in no checkpoint.
        return max(
            float((found.gradients[name] - alone.gradients[name]).nan_to_num().abs().max())
            / largest
            for name in names
        )

    return Deviations(
        loss=_relative(found.losses, alone.losses),
        grad_norm=_relative(found.grad_norms, alone.grad_norms),
        encoder=of_gradients("modality_submodules."),
        language=of_gradients("language_model."),
    )


def _relative(found: list[float], wanted: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))
