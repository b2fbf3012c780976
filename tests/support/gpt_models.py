"""Small GPTs for tests: configurations, chunks, microbatches, and megatron-core's schedule."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import functional

from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.model_config import GPTModelConfig
from bridge.training.config import ConfigContainer, TrainConfig
from bridge.training.model.initial_weights import initialize_weights

VOCABULARY = 64
SEQUENCE = 16


def tiny_gpt(**changes: Any) -> GPTModelConfig:
    """Return 4 gated layers of width 32 with 4 heads in 2 query groups, for the CPU."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": SEQUENCE,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_spec": "local",
        "pipeline_dtype": torch.float32,
    }
    return GPTModelConfig(**(values | changes))


def run_of(model: GPTModelConfig, **sections: Any) -> ConfigContainer:
    """Return a run of `model` on mock data, with micro batch 1."""
    defaults: dict[str, Any] = {
        "dataset": GPTDatasetConfig(mock=True),
        "train": TrainConfig(train_iters=2, global_batch_size=4, micro_batch_size=1),
    }
    return ConfigContainer(model=model, **(defaults | sections))


def open_fields_filled(
    config: ConfigContainer, device: Literal["cuda", "cpu"] = "cpu"
) -> ConfigContainer:
    """Return `config` with the model's open fields filled in."""
    model: Any = config.model
    for name, value in model.open_fields(config, device=device).items():
        if getattr(model, name) in (None, "auto"):
            setattr(model, name, value)
    return config


def build_chunks(model: GPTModelConfig, seed: int = 1) -> list[Any]:
    """Bring up the groups of the model's layout and build this rank's chunks."""
    vpp = model.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = []
    for stage in range(vpp) if vpp else (None,):
        ends: dict[str, Any] = {"ignore_virtual": stage is None, "vp_stage": stage}
        chunks.append(
            model.build(
                groups,
                parallel_state.is_pipeline_first_stage(**ends),
                parallel_state.is_pipeline_last_stage(**ends),
                stage,
            )
        )
    initialize_weights(chunks, seed, groups)
    return chunks


def microbatch(seed: int = 0, batch: int = 1, length: int = SEQUENCE) -> dict[str, torch.Tensor]:
    """Return random tokens whose mask excludes about a third of the positions."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (batch, length + 1), generator=generator)
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": (torch.rand(batch, length, generator=generator) > 1 / 3).float(),
        "position_ids": torch.arange(length).expand(batch, -1).contiguous(),
    }


def losses_of(
    forward_step: Any,
    chunks: list[Any],
    samples: Sequence[dict[str, Any]],
    forward_only: bool = True,
) -> list[list[float]]:
    """Run megatron-core's schedule; return [sum, count] of each microbatch on the last stage."""
    iterators: list[Iterator[Any]] = [iter(samples) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(samples),
        seq_length=samples[0]["tokens"].shape[1],
        micro_batch_size=samples[0]["tokens"].shape[0],
        forward_only=forward_only,
    )
    return [output["lm loss"].tolist() for output in outputs]
