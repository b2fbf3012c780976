"""Tiny models in Hugging Face's format: made by transformers, or by hand without it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bridge.gpt.conversion.hf_config import read_model_config
from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.model_config import GPTModelConfig
from bridge.training.checkpoint_weights import saved_config
from bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    OptimizerConfig,
    TrainConfig,
)

VOCABULARY = 65
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny model, with the names of older files."""
    model_type = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}.get(architecture, "x")
    values = {"architectures": [architecture], "model_type": model_type, "head_dim": 8}
    return values | SIZES | {"rms_norm_eps": 1e-6, "hidden_act": "silu"} | changes


def read_config(folder: Path, **changes: Any) -> GPTModelConfig:
    """Return the model section for a config.json with these changes."""
    (folder / "config.json").write_text(json.dumps(config_of(**changes)))
    return read_model_config(folder)


def write_folder(folder: Path, **changes: Any) -> Path:
    """Write a tiny untied Llama with random weights, as one file; needs no transformers."""
    folder.mkdir()
    config = config_of(**changes)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    hidden, mlp, width = (config[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (
            ("input_layernorm", (hidden,)),
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, queries)),
            ("post_attention_layernorm", (hidden,)),
            ("mlp.gate_proj", (mlp, hidden)),
            ("mlp.up_proj", (mlp, hidden)),
            ("mlp.down_proj", (hidden, mlp)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    tensors = {
        name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write_with_transformers(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Save a random model and return it in float32; norms and biases are random as well."""
    import transformers

    values = {name: value for name, value in config.items() if name != "architectures"}
    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class(**values, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
            # Not model.to: that would round the rotary frequencies as well.
            parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    return model.eval()


def run_from(checkpoint: Path, run_dir: Path, **layout: Any) -> ConfigContainer:
    """Return a run that starts from a checkpoint, with its model, at learning rate 0."""
    model: Any = saved_config(checkpoint).model
    for name, value in layout.items():
        setattr(model, name, value)
    return ConfigContainer(
        model=model,
        dataset=GPTDatasetConfig(mock=True),
        train=TrainConfig(train_iters=1, micro_batch_size=1, global_batch_size=2),
        optimizer=OptimizerConfig(lr=0.0, min_lr=0.0, weight_decay=0.0),
        checkpoint=CheckpointConfig(pretrained_checkpoint=str(checkpoint), run_dir=str(run_dir)),
    )


def logits_of(chunks: list[Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the logits ``[batch, sequence, vocabulary]``; None before the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(data: Iterator[torch.Tensor], model: Any) -> tuple[Any, Any]:
        ids = next(data)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        output = model(ids, positions, attention_mask=None, runtime_gather_output=True)
        return output, lambda logits, non_loss_data: logits

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([tokens]),
        model=chunks[0],
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0][..., :VOCABULARY].detach().clone() if outputs else None
