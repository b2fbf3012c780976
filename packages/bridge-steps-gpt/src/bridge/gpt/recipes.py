"""GPT recipes: named runs that train as they are, or with a path to data.

Sizes and vocabularies are those of the published models. The training settings are common ones, not
those of the papers.
"""

from typing import Any, cast

from torch.nn import functional

from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.data.sft.dataset_config import SFTDatasetConfig
from bridge.gpt.model_config import GPTModelConfig
from bridge.gpt.run_summary import RunSummary
from bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    LoggerConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    ValidationConfig,
    peft_method,
)
from bridge.training.contracts import Recipe
from bridge.training.gpt_step import forward_step


def _llama_block() -> dict[str, Any]:
    """Return the fields of Llama's block (arXiv:2302.13971, section 2.2), without dropout."""
    return {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _llama3_block() -> dict[str, Any]:
    """Return the fields that Llama 3's smaller models share."""
    return _llama_block() | {
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "seq_length": 8192,
        "vocab_size": 128_256,
        "rotary_base": 500_000,
    }


def _adamw(lr: float) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=lr / 10,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=1.0,
    )


def _large_run(
    *, lr: float, global_batch_size: int, micro_batch_size: int, vocab_size: int
) -> dict[str, Any]:
    """Return the sections other than the model of a run on several GPUs, on token files."""
    return {
        "train": TrainConfig(
            train_iters=10_000,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            num_workers=2,
        ),
        "validation": ValidationConfig(eval_interval=500, eval_iters=10),
        "optimizer": _adamw(lr),
        "scheduler": SchedulerConfig(lr_warmup_fraction=0.02),
        "dataset": GPTDatasetConfig(),
        "tokenizer": TokenizerConfig(type="null", vocab_size=vocab_size),
        "checkpoint": CheckpointConfig(save_interval=500),
    }


def _llama3_run() -> dict[str, Any]:
    return _large_run(lr=3e-4, global_batch_size=128, micro_batch_size=1, vocab_size=128_256)


def _gpt_tiny() -> ConfigContainer:
    return ConfigContainer(
        model=GPTModelConfig(
            **_llama_block(),
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=352,
            num_attention_heads=4,
            seq_length=128,
            # Each of the 257 tokens costs time on a CPU.
            make_vocab_size_divisible_by=8,
            # The default, 0.02, is for wide models; with it this narrow one lags for hundreds of
            # steps.
            init_method_std=0.06,
        ),
        # Two microbatches a step, so that a pipeline or two data-parallel replicas can share it.
        train=TrainConfig(train_iters=400, global_batch_size=16, micro_batch_size=8),
        validation=ValidationConfig(eval_iters=32),
        optimizer=_adamw(4e-3),
        scheduler=SchedulerConfig(lr_warmup_fraction=0.05),
        dataset=GPTDatasetConfig(standard_library=True),
        tokenizer=TokenizerConfig(type="bytes"),
        logger=LoggerConfig(log_interval=20),
    )


def _gpt_tiny_sft() -> ConfigContainer:
    config = _gpt_tiny()
    config.dataset = SFTDatasetConfig(standard_library=True)
    config.train.train_iters = 200
    config.validation = ValidationConfig()
    config.optimizer = _adamw(1e-3)
    return config


def _gpt_tiny_lora() -> ConfigContainer:
    config = _gpt_tiny_sft()
    config.peft = peft_method("lora", dim=16)
    # Two minutes on a CPU, with all imports.
    config.train.train_iters = 180
    config.optimizer = _adamw(4e-3)
    return config


def _gpt_125m() -> ConfigContainer:
    return ConfigContainer(
        model=GPTModelConfig(
            num_layers=12,
            hidden_size=768,
            num_attention_heads=12,
            seq_length=1024,
            vocab_size=50257,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        **_large_run(lr=6e-4, global_batch_size=256, micro_batch_size=8, vocab_size=50257),
    )


def _llama3_1b() -> ConfigContainer:
    return ConfigContainer(
        model=GPTModelConfig(
            **_llama3_block(),
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=8192,
            rope_scaling=True,
            rope_scaling_factor=32.0,
            share_embeddings_and_output_weights=True,
        ),
        **_llama3_run(),
    )


def _llama3_8b() -> ConfigContainer:
    return ConfigContainer(
        model=GPTModelConfig(
            **_llama3_block(),
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=14_336,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
        ),
        **_llama3_run(),
    )


def _llama3_8b_lora() -> ConfigContainer:
    config = _llama3_8b()
    model = cast(GPTModelConfig, config.model)
    # The frozen weights take 16 GB in bf16 and have no gradients, so one GPU holds them.
    model.tensor_model_parallel_size = 1
    model.sequence_parallel = False
    model.seq_length = 4096
    config.peft = peft_method("lora", dim=16)
    config.dataset = SFTDatasetConfig(packing=True)
    config.tokenizer = TokenizerConfig(type="huggingface")
    config.train = TrainConfig(
        train_iters=1000, global_batch_size=16, micro_batch_size=1, num_workers=2
    )
    config.validation = ValidationConfig(eval_interval=200)
    config.optimizer = _adamw(2e-4)
    config.checkpoint = CheckpointConfig(save_interval=200)
    return config


gpt_tiny = Recipe(
    name="gpt-tiny",
    summary="A byte-level GPT on Python's own sources: two minutes on a CPU, no preparation",
    make_config=_gpt_tiny,
    forward_step=forward_step,
    callbacks=lambda: [RunSummary()],
)

gpt_tiny_sft = Recipe(
    name="gpt-tiny-sft",
    summary="Fine-tunes gpt-tiny to summarize Python functions: a minute on a CPU, no preparation",
    make_config=_gpt_tiny_sft,
    forward_step=forward_step,
)

gpt_tiny_lora = Recipe(
    name="gpt-tiny-lora",
    summary="Fine-tunes gpt-tiny to summarize Python functions, with LoRA; needs bridge-peft",
    make_config=_gpt_tiny_lora,
    forward_step=forward_step,
)

gpt_125m = Recipe(
    name="gpt-125m",
    summary="GPT-2 small: 12 layers, hidden 768, sequence 1024; needs dataset.path or dataset.mock",
    make_config=_gpt_125m,
    forward_step=forward_step,
)

llama3_1b = Recipe(
    name="llama3-1b",
    summary="Llama 3.2 1B: 16 layers, hidden 2048, sequence 8192; needs dataset.path or "
    "dataset.mock",
    make_config=_llama3_1b,
    forward_step=forward_step,
)

llama3_8b = Recipe(
    name="llama3-8b",
    summary="Llama 3 8B: 32 layers, hidden 4096, sequence 8192, tensor-parallel over 2; needs "
    "dataset.path or dataset.mock",
    make_config=_llama3_8b,
    forward_step=forward_step,
)

llama3_8b_lora = Recipe(
    name="llama3-8b-lora",
    summary="LoRA on top of Llama 3 8B on one GPU, packed to 4096 tokens; needs dataset.path, a "
    "tokenizer and bridge-peft",
    make_config=_llama3_8b_lora,
    forward_step=forward_step,
)
