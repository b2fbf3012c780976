import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bridge.training.model.initial_weights import draw_with, initialize_weights
from bridge.training.transformer.local_layers import LayerNorm, LocalAttention, RMSNorm
from ranks import run_ranks

VOCABULARY = 64
SEQUENCE = 16
SEED = 1234
MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}
BIASED: dict[str, Any] = {
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "add_bias_linear": True,
    "normalization": "LayerNorm",
    "num_query_groups": 4,
}


def tiny_config(**changes: Any) -> TransformerConfig:
    """Return a finalized config: 4 gated layers of width 32, 4 heads in 2 query groups."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**(values | changes))


def layout_of(**layout: int) -> dict[str, Any]:
    """Initialize megatron-core's groups and return the config's fields of the layout.

    Args:
        layout: Any of tp, pp, vpp, cp, ep, etp.
    """
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": layout.get("tp", 1),
        "pipeline_model_parallel_size": layout.get("pp", 1),
        "virtual_pipeline_model_parallel_size": layout.get("vpp"),
        "context_parallel_size": layout.get("cp", 1),
        "expert_model_parallel_size": layout.get("ep", 1),
        "expert_tensor_parallel_size": layout.get("etp", layout.get("tp", 1)),
    }
    parallel_state.initialize_model_parallel(**sizes)
    # With two stages batched transfers of an interleaved schedule swap activations and gradients.
    extra = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if layout.get("vpp") else {}
    return sizes | extra


def build_tiny_gpt(config: TransformerConfig, **arguments: Any) -> list[GPTModel]:
    """Build this rank's chunks of a GPT with tied embeddings, for the groups that are up."""
    stages = range(config.virtual_pipeline_model_parallel_size or 0) or (None,)
    return [_build_chunk(config, stage, arguments) for stage in stages]


def _build_chunk(
    config: TransformerConfig, vp_stage: int | None, arguments: dict[str, Any]
) -> GPTModel:
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    layer: Any = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = LocalAttention
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": True,
    }
    ends: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    spec: Any = TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
    return GPTModel(
        config,
        spec,
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        vp_stage=vp_stage,
        **(defaults | arguments),
    )


def build(
    layout: dict[str, int], changes: dict[str, Any], seed: int = SEED, **arguments: Any
) -> tuple[Any, list[Any]]:
    """Build on this rank, from generators that differ between ranks and layouts."""
    sizes = layout_of(**layout)
    noise = torch.distributed.get_rank() + 10 * torch.distributed.get_world_size()
    torch.manual_seed(noise)
    model_parallel_cuda_manual_seed(noise, force_reset_rng=True)
    config = tiny_config(**(sizes | changes))
    chunks = build_tiny_gpt(config, **arguments)
    initialize_weights(chunks, seed, ProcessGroupCollection.use_mpu_process_groups())
    return config, chunks


def global_parameters(chunks: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's parameters, with layers and experts numbered as in the unsharded model."""
    experts_before = 0
    for chunk in chunks:
        layers = list(chunk.decoder.layers)
        for name, parameter in chunk.named_parameters():
            if found := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
                number = layers[int(found[1])].layer_number - 1
                name = f"decoder.layers.{number}.{found[2]}"
            if found := re.match(r"(.*local_experts\.)(\d+)(\..*)", name):
                ranks = parallel_state.get_expert_model_parallel_world_size()
                experts_before = (
                    parallel_state.get_expert_model_parallel_rank()
                    * chunk.config.num_moe_experts
                    // ranks
                )
                name = f"{found[1]}{experts_before + int(found[2])}{found[3]}"
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            yield name, parameter.detach().clone()


def piece(name: str, full: Tensor, rank: int, ranks: int, gated: bool) -> Tensor:
    """Return the shard of a tensor that a tensor-parallel rank holds."""
    owner = name.split(".")[-2]
    if owner in ("linear_proj", "linear_fc2"):
        return full.chunk(ranks, dim=-1)[rank] if name.endswith("weight") else full
    if owner == "linear_fc1" and gated:
        return torch.cat([half.chunk(ranks)[rank] for half in full.chunk(2)])
    if owner in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer"):
        return full.chunk(ranks)[rank]
    return full


@cache
def whole_model(kind: str, seed: int = SEED) -> dict[str, Tensor]:
    def on_one_rank() -> dict[str, Tensor]:
        _, chunks = build({}, KINDS[kind], seed)
        return dict(global_parameters(chunks))

    return run_ranks(1, on_one_rank)[0]


KINDS: dict[str, dict[str, Any]] = {"gated": {}, "biased": BIASED, "experts": MOE}


@pytest.mark.parametrize(
    ("kind", "world_size", "layout"),
    [
        ("gated", 2, {"tp": 2}),
        ("gated", 2, {"pp": 2}),
        ("gated", 2, {"pp": 2, "vpp": 2}),
        ("gated", 4, {"tp": 2, "pp": 2}),
        ("gated", 2, {"cp": 2}),
        ("biased", 2, {"tp": 2}),
        ("experts", 2, {"ep": 2}),
        ("experts", 2, {"tp": 2}),
        ("experts", 4, {"tp": 2, "ep": 2, "etp": 1, "pp": 2}),
    ],
    ids=lambda value: (
        "".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_every_layout_holds_pieces_of_the_same_model(
    kind: str, world_size: int, layout: dict[str, int]
) -> None:
    def on_a_rank() -> dict[str, tuple[int, int, Tensor]]:
        _, chunks = build(layout, KINDS[kind] | {"sequence_parallel": layout.get("tp", 1) > 1})
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        expert_place = (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
        return {
            name: (*(expert_place if "local_experts" in name else place), parameter)
            for name, parameter in global_parameters(chunks)
        }

    whole = whole_model(kind)
    seen = set()
    for parameters in run_ranks(world_size, on_a_rank):
        for name, (rank, ranks, parameter) in parameters.items():
            expected = piece(name, whole[name], rank, ranks, gated=kind != "biased")
            assert torch.equal(parameter, expected), name
            seen.add(name)
    assert seen == set(whole)


def mean_loss(layout: dict[str, int], changes: dict[str, Any]) -> float:
    """Return the loss of the same tokens, NaN before the last stage."""
    config, chunks = build(layout, changes)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(2, -1)

    def forward(data: Any, model: Any) -> tuple[Tensor, Any]:
        losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

    outputs = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[None] * len(chunks),
        model=chunks,
        num_microbatches=2,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=True,
    )
    return float(outputs[0]["loss"]) if outputs else float("nan")


@pytest.mark.parametrize(
    ("changes", "world_size", "layouts"),
    [
        ({}, 2, [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}]),
        (MOE, 2, [{"ep": 2}, {"tp": 2}]),
    ],
    ids=["dense", "experts"],
)
def test_the_first_loss_is_the_same_under_every_layout(
    changes: dict[str, Any], world_size: int, layouts: list[dict[str, int]]
) -> None:
    (expected,) = run_ranks(1, mean_loss, {}, changes)
    for layout in layouts:
        parallel = changes | {"sequence_parallel": "tp" in layout}
        losses = run_ranks(world_size, mean_loss, layout, parallel)
        given = [loss for loss in losses if loss == loss]
        assert given == pytest.approx([expected] * len(given), abs=1e-6), layout
        assert given


def test_the_seed_changes_the_weights() -> None:
    first, second = whole_model("gated"), whole_model("gated", seed=SEED + 1)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(first[name], second[name])


def test_no_two_weights_are_alike() -> None:
    for kind in KINDS:
        firsts = [
            float(tensor.flatten()[0])
            for name, tensor in whole_model(kind).items()
            if tensor.dim() == 2
        ]
        assert len(set(firsts)) == len(firsts)


def test_deviations_are_megatron_cores_and_norms_and_biases_are_constant() -> None:
    whole = whole_model("biased")
    layers = 4
    for name, tensor in whole.items():
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            is_output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = 0.02 / (2 * layers) ** 0.5 if is_output else 0.02
            assert float(tensor.std()) == pytest.approx(expected, rel=0.1), name


def test_padding_of_the_vocabulary_does_not_change_its_real_rows() -> None:
    def embeddings(rows: int) -> list[Tensor]:
        arguments = {"vocab_size": rows, "share_embeddings_and_output_weights": False}
        # An initializer whose deviation depends on the shape, padding included.
        changes = {"embedding_init_method": torch.nn.init.xavier_normal_}
        _, chunks = build({}, changes, **arguments)
        weights = dict(global_parameters(chunks))
        return [weights["embedding.word_embeddings.weight"], weights["output_layer.weight"]]

    (few,), (many,) = run_ranks(1, embeddings, 130), run_ranks(1, embeddings, 300)
    for short, long in zip(few, many, strict=True):
        assert torch.equal(short, long[:130])
        assert not torch.equal(long[:128], long[128:256])
    assert not torch.equal(*few)


def test_before_a_checkpoint_is_loaded_only_what_may_be_padded_is_drawn() -> None:
    untied = {"share_embeddings_and_output_weights": False}

    def anew() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        _, chunks = build({}, {}, **untied)
        drawn = dict(global_parameters(chunks))
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.zero_()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        initialize_weights(chunks, SEED, groups, only_padded=True)
        return drawn, dict(global_parameters(chunks))

    [(drawn, others)] = run_ranks(1, anew)
    matrices = {name for name, tensor in drawn.items() if tensor.dim() == 2}
    alike = {name for name in matrices if torch.equal(drawn[name], others[name])}
    assert alike == {"embedding.word_embeddings.weight", "output_layer.weight"}


def test_16_bit_weights_are_the_rounded_ones_wrapped_or_not() -> None:
    def weight(wrapped: bool) -> Tensor:
        layout_of()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = tiny_config(bf16=True, params_dtype=torch.bfloat16)
        chunks: list[Any] = build_tiny_gpt(config)
        if wrapped:
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        initialize_weights(chunks, SEED, ProcessGroupCollection.use_mpu_process_groups())
        named: dict[str, Tensor] = dict(chunks[0].named_parameters())
        return next(named[name].detach() for name in named if "layers.1.mlp" in name)

    (bare,), (inside,) = run_ranks(1, weight, False), run_ranks(1, weight, True)
    assert torch.equal(bare, inside)
    name = next(n for n in whole_model("gated") if "layers.1.mlp" in n)
    assert torch.equal(bare, whole_model("gated")[name].bfloat16())


def test_a_users_initializer_sees_unsharded_tensors() -> None:
    def shapes_seen() -> set[tuple[int, ...]]:
        shapes = set()

        def remember(tensor: Tensor) -> Tensor:
            shapes.add(tuple(tensor.shape))
            return torch.nn.init.constant_(tensor, 0.5)

        config = tiny_config(**layout_of(tp=2), init_method=remember)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        chunks: list[Any] = build_tiny_gpt(config)
        shapes.clear()
        initialize_weights(chunks, SEED, ProcessGroupCollection.use_mpu_process_groups())
        weight = chunks[0].decoder.layers[0].mlp.linear_fc1.weight
        assert torch.equal(weight, torch.full_like(weight, 0.5))
        return shapes

    assert {(96, 32), (64, 32)} <= run_ranks(2, shapes_seen)[0]


def test_the_generators_are_left_as_they_were() -> None:
    def states_equal() -> bool:
        _, chunks = build({}, {})
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        initialize_weights(chunks, SEED, ProcessGroupCollection.use_mpu_process_groups())
        after = torch.get_rng_state(), torch.cuda.get_rng_state()
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    assert run_ranks(1, states_equal) == [True]


class OwnModel(MegatronModule):
    """A user's model: a replicated layer, and one that is sharded over tensor-parallel ranks."""

    def __init__(self, split: bool) -> None:
        super().__init__(tiny_config(tensor_model_parallel_size=2))
        self.mine = torch.nn.Linear(4, 4)
        self.scorer = (
            tensor_parallel.ColumnParallelLinear(
                32, 8, config=self.config, init_method=torch.nn.init.ones_
            )
            if split
            else None
        )


def test_a_users_modules_keep_their_weights_and_unknown_sharded_ones_are_rejected() -> None:
    def messages() -> tuple[bool, str]:
        layout_of(tp=2)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        plain, own = torch.nn.Linear(4, 4), OwnModel(split=False)
        before = [parameter.clone() for parameter in (*plain.parameters(), *own.parameters())]
        initialize_weights([plain, own], SEED, groups)
        after = [*plain.parameters(), *own.parameters()]
        try:
            initialize_weights([OwnModel(split=True)], SEED, groups)
        except ValueError as error:
            return all(map(torch.equal, before, after)), str(error)
        return False, ""

    for kept, message in run_ranks(2, messages):
        assert kept
        assert message.startswith("scorer.weight:")
        assert "rng.layout_invariant_init=false" in message


class Modules(MegatronModule):
    """A model whose modules have their own configs; one has a user's weights."""

    def __init__(self) -> None:
        super().__init__(tiny_config())
        self.first = Encoder(init_method_std=0.5)
        self.second = Encoder(init_method_std=0.02)


class Encoder(MegatronModule):
    """A transformer's MLP, and weights that megatron-core does not know."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(tiny_config(**changes))
        assert self.config.init_method is not None
        self.mlp = torch.nn.Module()
        self.mlp.linear_fc1 = torch.nn.Linear(32, 64)
        self.patches = torch.nn.Linear(16, 32)
        self.positions = torch.nn.Parameter(torch.empty(9, 32))
        draw_with(self.patches.weight, self.config.init_method)
        draw_with(self.positions, torch.nn.init.ones_)


def test_a_users_weights_that_are_named_are_drawn_by_their_own_config() -> None:
    def weights(noise: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        layout_of()
        torch.manual_seed(noise)
        own = Modules()
        before = {name: value.detach().clone() for name, value in own.named_parameters()}
        initialize_weights([own], SEED, ProcessGroupCollection.use_mpu_process_groups())
        return before, {name: parameter.detach() for name, parameter in own.named_parameters()}

    (before, after), (_, again) = run_ranks(1, weights, 1)[0], run_ranks(1, weights, 2)[0]
    for name in ("patches.weight", "mlp.linear_fc1.weight"):
        first, second = f"first.{name}", f"second.{name}"
        assert torch.equal(after[first], again[first])
        assert float(after[first].std()) == pytest.approx(0.5, rel=0.1)
        assert float(after[second].std()) == pytest.approx(0.02, rel=0.1)
    # A run without layout-invariant weights starts from this.
    assert float(before["first.patches.weight"].std()) == pytest.approx(0.5, rel=0.1)
    assert torch.equal(after["first.positions"], torch.ones(9, 32))
    assert torch.equal(before["first.patches.bias"], after["first.patches.bias"])
