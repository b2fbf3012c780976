"""Multimodal configurations small enough for a test, their microbatches and their runs."""

from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge.mimo.data.microbatches import Collate
from bridge.mimo.data.mock import MockDatasetConfig
from bridge.mimo.data.samples import make_next_token_sample
from bridge.mimo.model import MultimodalModel
from bridge.mimo.model_config import MultimodalModelConfig
from bridge.mimo.sections import (
    LanguageModelConfig,
    ModuleParallelism,
    ProjectionConfig,
    VisionEncoderConfig,
)
from bridge.training.config import ConfigContainer, TrainConfig, resolve
from bridge.training.model.initial_weights import initialize_weights
from training_runs import own_run

VOCABULARY = 24
SEQUENCE = 12
IMAGE = -7
"""A special token need not be in the vocabulary."""
PER_IMAGE = 4


def tiny_mimo(
    *,
    language: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    projection: Literal["linear", "mlp"] = "linear",
    tensor: int | None = None,
    **fields: Any,
) -> MultimodalModelConfig:
    """Return an encoder of 4 x 4 images, 4 tokens each, and a GPT; `fields` are of the model."""
    common: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    language_values: dict[str, Any] = {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "seq_length": SEQUENCE,
    }
    vision_values: dict[str, Any] = {
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "image_size": 4,
        "patch_size": 2,
        "num_channels": 1,
    }
    values: dict[str, Any] = {
        "language": LanguageModelConfig(**(common | language_values | (language or {}))),
        "encoders": {"vision": VisionEncoderConfig(**(common | vision_values | (vision or {})))},
        "projections": {"vision": ProjectionConfig(kind=projection)},
        "special_token_ids": {"vision": IMAGE},
        "parallelism": {
            "vision": ModuleParallelism(),
            "language": ModuleParallelism(tensor_model_parallel_size=tensor),
        },
    }
    return MultimodalModelConfig(**(values | fields))


def mimo_run(
    directory: Path | str, model: MultimodalModelConfig, **sections: Any
) -> ConfigContainer:
    """Return a run that logs every step; samples have 0 to 2 images."""
    values: dict[str, Any] = {
        "model": model,
        "dataset": MockDatasetConfig(size=64, validation_size=0, min_images=0, max_images=2),
        "optimizer": OptimizerConfig(lr=3e-3, min_lr=3e-4, weight_decay=0.1, clip_grad=0.5),
        "train": TrainConfig(train_iters=5, global_batch_size=8, micro_batch_size=2),
    }
    return own_run(directory, **(values | sections))


def resolved(model: MultimodalModelConfig, world_size: int = 1) -> MultimodalModelConfig:
    """Return the section, resolved for a run on CPUs."""
    config = resolve(mimo_run("unused", model), device="cpu", world_size=world_size)
    assert isinstance(config.model, MultimodalModelConfig)
    return config.model


def build(model: MultimodalModelConfig, seed: int = 1) -> MultimodalModel:
    """Initialize the groups of colocated modules and build the model on this rank."""
    model = resolved(model, torch.distributed.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_parallel_size("language")
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    built = model.build(groups, True, True, None)
    initialize_weights([built], seed, groups)
    return built


def sample(images: int, text: int, seed: int = 0) -> dict[str, Any]:
    """Return a sample of random images, then random text; all of the text counts in the loss."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(VOCABULARY, (text,), generator=generator).tolist()
    tokens = [IMAGE] * (images * PER_IMAGE) + words
    return make_next_token_sample(
        tokens,
        counted=range(max(1, images * PER_IMAGE), len(tokens)),
        seq_length=SEQUENCE,
        padding=0,
        items={"vision": {"pixels": torch.rand((images, 1, 4, 4), generator=generator)}},
    )


def microbatch(*samples: dict[str, Any], pack: bool = False) -> dict[str, Any]:
    """Return a microbatch for `tiny_mimo`; of one sample with two images and one with none."""
    chosen = samples or (sample(2, 5), sample(0, 9, seed=1))
    collate = Collate(
        special_token_ids={"vision": IMAGE},
        tokens_per_item={"vision": PER_IMAGE},
        pack=pack,
        multiple_of=2,
    )
    return collate(chosen)
