"""Multimodal recipes: named runs that train as they are."""

from typing import Any

from torch.nn import functional

from bridge.mimo.accuracy import AnswerAccuracy
from bridge.mimo.data.digits import IMAGE, IMAGE_SIZE, VOCABULARY, DigitsDatasetConfig
from bridge.mimo.data.mock import MockDatasetConfig
from bridge.mimo.model_config import MultimodalModelConfig
from bridge.mimo.sections import (
    LanguageModelConfig,
    ModuleParallelism,
    ProjectionConfig,
    VisionEncoderConfig,
)
from bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    LoggerConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
    ValidationConfig,
)
from bridge.training.contracts import Recipe
from bridge.training.mimo_step import forward_step

_NO_DROPOUT: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def _adam(*, lr: float, min_lr: float) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
    )


def _mimo_digits() -> ConfigContainer:
    width: dict[str, Any] = {
        **_NO_DROPOUT,
        "hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        # The default of 0.02 is for wide models.
        "init_method_std": 0.12,
    }
    vision = VisionEncoderConfig(
        **width,
        num_layers=2,
        activation_func=functional.gelu,
        image_size=IMAGE_SIZE,
        patch_size=4,
        num_channels=1,
    )
    return ConfigContainer(
        model=MultimodalModelConfig(
            language=LanguageModelConfig(
                **width,
                num_layers=2,
                normalization="RMSNorm",
                vocab_size=VOCABULARY,
                make_vocab_size_divisible_by=8,
                seq_length=vision.tokens_per_image + 1,
            ),
            encoders={"vision": vision},
            projections={"vision": ProjectionConfig(kind="linear")},
            special_token_ids={"vision": IMAGE},
            parallelism={"vision": ModuleParallelism(), "language": ModuleParallelism()},
        ),
        # Two microbatches a step, one for each of two data-parallel ranks. The 360 held-out images
        # are six global batches.
        train=TrainConfig(train_iters=500, global_batch_size=60, micro_batch_size=30),
        optimizer=_adam(lr=2e-3, min_lr=2e-5),
        scheduler=SchedulerConfig(lr_warmup_fraction=0.05),
        dataset=DigitsDatasetConfig(),
        logger=LoggerConfig(log_interval=20),
    )


def _mimo_llava() -> ConfigContainer:
    vision = VisionEncoderConfig(
        **_NO_DROPOUT,
        num_layers=24,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=16,
        activation_func=functional.gelu,
        image_size=336,
        patch_size=14,
        num_channels=3,
    )
    language = LanguageModelConfig(
        **_NO_DROPOUT,
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        vocab_size=128_256,
        seq_length=2048,
        rotary_base=500_000,
        share_embeddings_and_output_weights=True,
    )
    return ConfigContainer(
        model=MultimodalModelConfig(
            language=language,
            encoders={"vision": vision},
            projections={"vision": ProjectionConfig(kind="mlp")},
            # It is not in the vocabulary.
            special_token_ids={"vision": -200},
            parallelism={"vision": ModuleParallelism(), "language": ModuleParallelism()},
        ),
        train=TrainConfig(
            train_iters=5000, global_batch_size=64, micro_batch_size=4, num_workers=4
        ),
        validation=ValidationConfig(eval_interval=500, eval_iters=4),
        optimizer=_adam(lr=2e-5, min_lr=2e-6),
        scheduler=SchedulerConfig(lr_warmup_fraction=0.03),
        dataset=MockDatasetConfig(),
        checkpoint=CheckpointConfig(save_interval=500),
    )


mimo_llava = Recipe(
    name="mimo-llava",
    summary="ViT-L/14 at 336 pixels, an MLP and Llama 3.2 1B, sequence 2048, on mock data; for "
    "GPUs",
    make_config=_mimo_llava,
    forward_step=forward_step,
)

mimo_digits = Recipe(
    name="mimo-digits",
    summary="An image encoder and a GPT that says which handwritten digit it sees: a minute on a "
    "CPU",
    make_config=_mimo_digits,
    forward_step=forward_step,
    callbacks=lambda: [AnswerAccuracy()],
)
