"""Checks of each transformer's sizes: heads, widths and experts, divided over ranks."""

from collections.abc import Callable, Iterator, Mapping

from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config.layout import Layout
from bridge.training.config.schema.errors import Problem


def transformer_problems(
    model: TransformerConfig, layout: Layout, path: str, sources: Mapping[str, str]
) -> Iterator[Problem]:
    """Yield the sizes of a transformer that do not fit each other or its parallel layout.

    Args:
        model: The transformer's section.
        layout: The layout that it asks for.
        path: The path of the section, such as "model".
        sources: The fields that fields of the section are derived from, by path.
    """

    def named(name: str) -> str:
        return sources.get(f"{path}.{name}", f"{path}.{name}")

    yield from _head_problems(model, layout, named)
    yield from _width_problems(model, layout, named)
    yield from _expert_problems(model, layout, named)


def _head_problems(
    model: TransformerConfig, layout: Layout, named: Callable[[str], str]
) -> Iterator[Problem]:
    heads, hidden, groups = model.num_attention_heads, model.hidden_size, model.num_query_groups
    sizes = [(named(name), getattr(model, name)) for name in _POSITIVE]
    for field, value in sizes:
        if value < 1:
            yield Problem((field,), f"{field}={value}: must be positive; raise it")
    if any(value < 1 for _, value in sizes):
        return
    heads_field, tensor_field = named("num_attention_heads"), named("tensor_model_parallel_size")
    if model.kv_channels is None and hidden % heads:
        hidden_field, width_field = named("hidden_size"), named("kv_channels")
        yield Problem(
            (hidden_field, heads_field, width_field),
            f"{hidden_field}={hidden}: is not a multiple of {heads_field}={heads}; change one, or "
            f"give {width_field}",
        )
    yield from _multiple_problems(heads_field, heads, tensor_field, layout.tensor)
    if groups is None:
        return
    groups_field = named("num_query_groups")
    if groups < 1 or heads % groups:
        yield Problem(
            (groups_field, heads_field),
            f"{groups_field}={groups}: does not divide {heads_field}={heads}; change one",
        )
    elif groups % layout.tensor and layout.tensor % groups:
        yield Problem(
            (groups_field, tensor_field),
            f"{groups_field}={groups}: is neither a multiple nor a divisor of "
            f"{tensor_field}={layout.tensor}; change one",
        )


_POSITIVE = ("num_layers", "hidden_size", "num_attention_heads")


def _width_problems(
    model: TransformerConfig, layout: Layout, named: Callable[[str], str]
) -> Iterator[Problem]:
    """Yield the widths of MLPs that do not divide evenly over tensor-parallel ranks."""
    dense = model.ffn_hidden_size or 4 * model.hidden_size
    expert = model.moe_ffn_hidden_size or dense
    shared = model.moe_shared_expert_intermediate_size or 0
    tensor = (named("tensor_model_parallel_size"), layout.tensor)
    expert_tensor = (named("expert_tensor_parallel_size"), layout.expert_tensor)
    if model.num_moe_experts is None or model.moe_layer_freq != 1:
        yield from _multiple_problems(named("ffn_hidden_size"), dense, *tensor)
    if model.num_moe_experts is not None:
        yield from _multiple_problems(named("moe_ffn_hidden_size"), expert, *expert_tensor)
        shared_field = named("moe_shared_expert_intermediate_size")
        yield from _multiple_problems(shared_field, shared, *tensor)


def _expert_problems(
    model: TransformerConfig, layout: Layout, named: Callable[[str], str]
) -> Iterator[Problem]:
    experts, experts_field = model.num_moe_experts, named("num_moe_experts")
    size_field = named("expert_model_parallel_size")
    if experts is None:
        if layout.expert > 1:
            yield Problem(
                (size_field, experts_field),
                f"{size_field}={layout.expert}: needs experts; give {experts_field}",
            )
        return
    yield from _multiple_problems(experts_field, experts, size_field, layout.expert)
    if layout.tensor > 1 and not model.sequence_parallel:
        tensor_field = named("tensor_model_parallel_size")
        sequence_field = named("sequence_parallel")
        yield Problem(
            (experts_field, tensor_field, sequence_field),
            f"{experts_field}={experts}: on {tensor_field}={layout.tensor} needs "
            f"{sequence_field}=true, without which every rank would route every token; set that",
        )
    if layout.expert_tensor > 1 and model.add_bias_linear:
        bias_field, tensor_field = named("add_bias_linear"), named("expert_tensor_parallel_size")
        yield Problem(
            (bias_field, tensor_field),
            f"{bias_field}=true: on {tensor_field}={layout.expert_tensor} would add each bias of "
            f"an expert {layout.expert_tensor} times; set the one to false or the other to 1",
        )
    if model.moe_z_loss_coeff == 0:
        field = named("moe_z_loss_coeff")
        yield Problem(
            (field,),
            f"{field}=0: gives a z-loss whose value megatron-core divides by it; set it to null "
            "for none",
        )
    if (chunks := model.mlp_chunks_for_training) > 1:
        field = named("mlp_chunks_for_training")
        yield Problem(
            (field,),
            f"{field}={chunks}: would take each chunk of the positions for a sequence of the "
            "experts' load-balancing losses; set it to 1",
        )


def _multiple_problems(field: str, value: int, size_field: str, size: int) -> Iterator[Problem]:
    if value % size:
        yield Problem(
            (field, size_field),
            f"{field}={value}: is not a multiple of {size_field}={size}; change one",
        )
