"""The weights of Llama's block: for each of ours, the tensors of Hugging Face's format.

Two of ours are several tensors there. ``linear_qkv`` has the query, key and value projections, and
``linear_fc1`` the gate and up projections, each as some of its rows.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from bridge.training.contracts import ExportedWeight
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.gpt.model_config import GPTModelConfig


def weight_map(model: "GPTModelConfig") -> dict[str, ExportedWeight]:
    """Return every weight of a model by our names.

    Raises:
        UsageError: The model's vocab_size is open.
    """
    if model.vocab_size is None:
        raise UsageError("model.vocab_size: None; give the number of tokens")
    hidden, vocabulary = model.hidden_size, (model.vocab_size, model.hidden_size)
    weights = {
        "embedding.word_embeddings.weight": _unsplit("model.embed_tokens.weight", vocabulary)
    }
    for layer in range(model.num_layers):
        for name, weight in _layer(model, f"model.layers.{layer}"):
            weights[f"decoder.layers.{layer}.{name}"] = weight
    weights["decoder.final_layernorm.weight"] = _unsplit("model.norm.weight", (hidden,))
    if not model.share_embeddings_and_output_weights:
        weights["output_layer.weight"] = _unsplit("lm_head.weight", vocabulary)
    return weights


def _layer(model: "GPTModelConfig", hf_layer: str) -> Iterator[tuple[str, ExportedWeight]]:
    hidden, mlp = model.hidden_size, model.mlp_width
    heads, width = model.num_attention_heads, model.head_width
    qkv = {f"{hf_layer}.self_attn.{name}_proj": rows for name, rows in _rows_of_qkv(model).items()}
    gated = {
        f"{hf_layer}.mlp.gate_proj": torch.arange(mlp),
        f"{hf_layer}.mlp.up_proj": torch.arange(mlp, 2 * mlp),
    }
    attention = "self_attention"
    yield (
        f"{attention}.linear_qkv.layer_norm_weight",
        _unsplit(f"{hf_layer}.input_layernorm.weight", (hidden,)),
    )
    yield from _linear(model, f"{attention}.linear_qkv", qkv, hidden)
    if model.qk_layernorm:
        for letter in "qk":
            norm = _unsplit(f"{hf_layer}.self_attn.{letter}_norm.weight", (width,))
            yield f"{attention}.{letter}_layernorm.weight", norm
    output = {f"{hf_layer}.self_attn.o_proj": None}
    yield from _linear(model, f"{attention}.linear_proj", output, heads * width, hidden)
    yield (
        "mlp.linear_fc1.layer_norm_weight",
        _unsplit(f"{hf_layer}.post_attention_layernorm.weight", (hidden,)),
    )
    yield from _linear(model, "mlp.linear_fc1", gated, hidden)
    yield from _linear(model, "mlp.linear_fc2", {f"{hf_layer}.mlp.down_proj": None}, mlp, hidden)


def _rows_of_qkv(model: "GPTModelConfig") -> dict[str, torch.Tensor]:
    """Return the rows of linear_qkv that are queries, keys and values.

    The rows are ``[query groups, queries of a group + 2, head width]``: in each group first its
    queries, then its key, then its value.
    """
    groups, width = model.query_groups, model.head_width
    queries = model.num_attention_heads // groups
    rows = torch.arange(groups * (queries + 2) * width).view(groups, queries + 2, width)
    return {
        "q": rows[:, :queries].flatten(),
        "k": rows[:, queries].flatten(),
        "v": rows[:, queries + 1].flatten(),
    }


def _linear(
    model: "GPTModelConfig",
    name: str,
    parts: dict[str, torch.Tensor] | dict[str, None],
    inputs: int,
    outputs: int | None = None,
) -> Iterator[tuple[str, ExportedWeight]]:
    """Yield a linear layer's weight and, where the model has biases, its bias.

    Args:
        model: The model.
        name: The layer's name within its transformer layer.
        parts: The modules in Hugging Face's format, each with the rows that it has (None: all).
        inputs: Number of columns.
        outputs: Number of rows; None for the rows of all `parts` together.
    """
    rows = outputs or sum(len(part) for part in parts.values() if part is not None)
    for leaf, shape in (("weight", (rows, inputs)), ("bias", (rows,))):
        if leaf == "weight" or model.add_bias_linear:
            named = {f"{module}.{leaf}": part for module, part in parts.items()}
            yield f"{name}.{leaf}", ExportedWeight(shape=shape, parts=named)


def _unsplit(name: str, shape: tuple[int, ...]) -> ExportedWeight:
    return ExportedWeight(shape=shape, parts={name: None})
