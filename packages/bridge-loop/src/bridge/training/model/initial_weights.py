"""Initial weights that do not depend on the parallel layout.

megatron-core draws each rank's shard from that rank's generator, so initial weights differ with
layout and device. Here a weight is a function of the seed, its global name and its unsharded shape:
the unsharded tensor is drawn on the CPU by the config's own initializer, and each rank copies its
shard. The global name and the shard of each rank come from megatron-core's sharded state dict,
which also lets a checkpoint move between layouts: gated units, fused QKV, experts and tied
embeddings included.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor

from bridge.training.usage_error import UsageError

logger = logging.getLogger(__name__)

type Initializer = Callable[[Tensor], object]

SWITCH = "set rng.layout_invariant_init=false to keep the model's own initialization"

_ROWS_OF_A_BLOCK = 128

_INPUT_WEIGHTS = {
    "eh_proj.weight",
    "fc1_latent_proj.weight",
    "linear_fc1.weight",
    "linear_kv.weight",
    "linear_kv_down_proj.weight",
    "linear_kv_up_proj.weight",
    "linear_q.weight",
    "linear_q_down_proj.weight",
    "linear_q_proj.weight",
    "linear_q_up_proj.weight",
    "linear_qkv.weight",
    "linear_qkv_down_proj.weight",
    "router.bias",
    "router.weight",
    "shared_experts.gate_weight",
}
_OUTPUT_WEIGHTS = {"fc2_latent_proj.weight", "linear_fc2.weight", "linear_proj.weight"}
_EMBEDDINGS = {
    "position_embeddings.weight",
    "tokentype_embeddings.weight",
    "word_embeddings.weight",
}


def draw_with(parameter: Tensor, initializer: Initializer) -> None:
    """Set the initializer with which `initialize_weights` draws a weight of a user's module.

    The weight is drawn at once too, from the default generator, for runs without
    rng.layout_invariant_init.

    Args:
        parameter: Unsharded on this rank, or a shard according to its module's sharded state dict.
        initializer: Fills an unsharded tensor in place, like those of ``torch.nn.init`` and a
            config's ``init_method``.
    """
    parameter.initializer = initializer  # type: ignore[attr-defined]
    with torch.no_grad():
        initializer(parameter)


def initialize_weights(
    model_chunks: Iterable[torch.nn.Module],
    seed: int,
    pg_collection: ProcessGroupCollection,
    *,
    only_padded: bool = False,
) -> None:
    """Draw the weights of a megatron-core model, the same under every layout and device.

    Call it before an optimizer copies the weights. Norms and biases keep megatron-core's constants.
    A module that is no megatron-core transformer keeps its own initialization, except for weights
    with an initializer of `draw_with`. Rows of an embedding do not depend on the number of rows
    that pad it.

    Args:
        model_chunks: This rank's part of the model, wrapped for 16 bits or not.
        seed: The run's seed.
        pg_collection: This rank's process groups; its ``dp_cp`` is read.
        only_padded: Draw only weights of which a checkpoint that is loaded next may have a part:
            those whose rows are padded to a multiple that depends on the layout.

    Raises:
        UsageError: A weight is sharded over ranks, and its initializer is not known.
    """
    for chunk in model_chunks:
        module = unwrap_model(chunk)
        config = getattr(module, "config", None)
        if not isinstance(module, MegatronModule) or not isinstance(config, TransformerConfig):
            continue
        if config.perform_initialization:
            _initialize_chunk(module, seed, pg_collection, only_padded=only_padded)


@torch.no_grad()
def initialize_added_weights(
    model_chunks: Iterable[torch.nn.Module],
    added: Iterable[torch.nn.Parameter],
    seed: int,
    pg_collection: ProcessGroupCollection,
) -> None:
    """Draw weights that were added to a model, and leave all others as they are.

    Only weights with an initializer of `draw_with` are drawn.

    Args:
        model_chunks: This rank's part of the model, wrapped for 16 bits or not.
        added: The new parameters.
        seed: The run's seed.
        pg_collection: This rank's process groups; its ``dp_cp`` is read.
    """
    wanted = {id(parameter) for parameter in added}
    for chunk in model_chunks:
        for parameter, shards in shards_of_parameters(unwrap_model(chunk), pg_collection):
            initializer = getattr(parameter, "initializer", None)
            if id(parameter) in wanted and initializer is not None:
                for shard in shards:
                    if shard.data is not None:
                        shard.data.copy_(_draw_shard(shard, initializer, seed))


@torch.no_grad()
def _initialize_chunk(
    module: MegatronModule, seed: int, pg_collection: ProcessGroupCollection, *, only_padded: bool
) -> None:
    described: set[int] = set()
    kept: list[str] = []
    configs = _config_of_each_parameter(module)
    for parameter, shards in shards_of_parameters(module, pg_collection):
        described.add(id(parameter))
        for shard in shards:
            if only_padded and not shard.allow_shape_mismatch:
                continue
            initializer = getattr(parameter, "initializer", None)
            if initializer is None:
                initializer = initializer_of(shard.key, configs[id(parameter)])
            if initializer is not None and shard.data is not None:
                shard.data.copy_(_draw_shard(shard, initializer, seed))
            elif not _is_constant(shard.key):
                _reject_if(_is_split(shard), shard.key)
                kept.append(shard.key)
    for name, parameter in module.named_parameters():
        if id(parameter) not in described and not only_padded:
            _reject_if(_is_marked_split(parameter), name)
            kept.append(name)
    if kept:
        logger.info("weights that keep their module's own initialization: %s", ", ".join(kept))


def _config_of_each_parameter(module: MegatronModule) -> dict[int, TransformerConfig]:
    """Return, by the parameter's id, the config of the innermost transformer that it is in.

    A model of several modules has one for each of them.
    """
    found: dict[int, TransformerConfig] = {}
    for part in module.modules():  # outer modules come first
        config = getattr(part, "config", None)
        if isinstance(config, TransformerConfig):
            found.update({id(parameter): config for parameter in part.parameters()})
    return found


def initializer_of(name: str, config: TransformerConfig) -> Initializer | None:
    """Return the initializer of megatron-core's layers for a weight of this name, if any."""
    role = ".".join(name.split(".")[-2:])
    if role in _INPUT_WEIGHTS:
        return config.init_method
    if role in _OUTPUT_WEIGHTS:
        return config.output_layer_init_method
    if role in _EMBEDDINGS:
        return config.embedding_init_method
    if role == "output_layer.weight":  # as GPTModel chooses
        return config.embedding_init_method if config.use_mup else config.init_method
    return None


def _is_constant(name: str) -> bool:
    """Whether megatron-core starts a parameter of this name at a constant: norms and biases."""
    *_, owner, leaf = ["", *name.split(".")]
    return leaf == "bias" or leaf.startswith("layer_norm_") or "norm" in owner


def _reject_if(is_split: bool, name: str) -> None:
    if is_split:
        raise UsageError(f"{name}: no layout-invariant initialization is known for it; {SWITCH}")


def _is_split(shard: ShardedTensor) -> bool:
    return bool(shard.prepend_axis_num) or tuple(shard.local_shape) != tuple(shard.global_shape)


def _is_marked_split(parameter: torch.nn.Parameter) -> bool:
    of_expert = not getattr(parameter, "allreduce", True)
    return of_expert or getattr(parameter, "tensor_model_parallel", False)


def shards_of_parameters(
    module: MegatronModule, pg_collection: ProcessGroupCollection
) -> Iterator[tuple[torch.nn.Parameter, list[ShardedTensor]]]:
    """Yield each parameter with its shards and their offsets in the unsharded tensors.

    The shards' data are views of the parameter. A layer has its number in the name, an expert has
    an index before the tensor's own axes.
    """
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": pg_collection.dp_cp}
    for entry in module.sharded_state_dict(metadata=metadata).values():
        if not isinstance(entry.data, torch.nn.Parameter):
            continue  # a buffer, or the state of a module
        if isinstance(entry, ShardedTensorFactory):  # a gated unit: the gate, then the rest
            yield entry.data, entry.build()
        else:
            yield entry.data, [entry]


def _draw_shard(shard: ShardedTensor, initializer: Initializer, seed: int) -> Tensor:
    """Draw the unsharded tensor and return this rank's shard of it."""
    axes = shard.prepend_axis_num
    name = "/".join(map(str, [shard.key, *shard.global_offset[:axes]]))
    offset, shape = shard.global_offset[axes:], shard.global_shape[axes:]
    if shard.allow_shape_mismatch:
        # Rows of the vocabulary, padded to a multiple that depends on the layout.
        return _rows(name, offset[0], shard.local_shape[0], shape[1:], initializer, seed)
    full = _draw(name, shape, initializer, seed)
    for axis, (start, length) in enumerate(zip(offset, shard.local_shape, strict=True)):
        full = full.narrow(axis, start, length)
    return full


def _rows(
    name: str,
    first: int,
    count: int,
    row_shape: tuple[int, ...],
    initializer: Initializer,
    seed: int,
) -> Tensor:
    """Draw rows in separately seeded blocks, so that none depends on the number of rows."""
    first_block = first // _ROWS_OF_A_BLOCK
    last_block = (first + count - 1) // _ROWS_OF_A_BLOCK
    blocks = [
        _draw(f"{name}/rows{block}", (_ROWS_OF_A_BLOCK, *row_shape), initializer, seed)
        for block in range(first_block, last_block + 1)
    ]
    return torch.cat(blocks).narrow(0, first - first_block * _ROWS_OF_A_BLOCK, count)


def _draw(name: str, shape: tuple[int, ...], initializer: Initializer, seed: int) -> Tensor:
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    with _generator_seeded_by(name, seed):
        initializer(values)
    return values


@contextmanager
def _generator_seeded_by(name: str, seed: int) -> Iterator[None]:
    """Seed the CPU's generator, from which torch.nn.init draws, and restore its state after."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(int.from_bytes(digest, "big"))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
