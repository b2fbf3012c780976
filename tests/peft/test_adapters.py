"""The adapters compute the equations of their papers, for layers of torch and megatron-core."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Linear, ModuleDict
from torch.nn.functional import linear, silu

from bridge.peft import AdaptedLinear, CanonicalLoRA, DoRA, LoRA


def filled(layer: AdaptedLinear) -> AdaptedLinear:
    """Give every parameter of the adapter random values."""
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return layer


def attached(method: Any, *, bias: bool = True) -> tuple[Any, Any]:
    model = ModuleDict({"layer": Linear(5, 3, bias=bias)})
    [layer] = method.attach([model])
    return model, filled(layer)


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = dict(layer.adapter.named_parameters())
    return tensors["linear_in.weight"], tensors["linear_out.weight"]


@pytest.mark.parametrize("bias", [True, False])
def test_lora_adds_the_scaled_product(bias: bool) -> None:
    _, layer = attached(LoRA(target_modules=["layer"], dim=2, alpha=6.0), bias=bias)
    x = torch.randn(7, 5)
    a, b = factors(layer)
    assert a.shape == (2, 5)
    assert b.shape == (3, 2)
    torch.testing.assert_close(layer(x), layer.base(x) + 3 * x @ a.T @ b.T)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_sets_the_length_of_every_row(bias: bool) -> None:
    _, layer = attached(DoRA(target_modules=["layer"], dim=2, alpha=6.0), bias=bias)
    x = torch.randn(7, 5)
    a, b = factors(layer)
    v = layer.base.weight + 3 * b @ a
    weight = layer.adapter.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), linear(x, weight, layer.base.bias))


def test_gradients_of_dora_do_not_pass_through_the_lengths() -> None:
    _, layer = attached(DoRA(target_modules=["layer"], dim=2, alpha=6.0))
    x = torch.randn(7, 5)
    layer(x).square().sum().backward()
    a, b = (factor.detach().clone().requires_grad_() for factor in factors(layer))
    magnitude: Any = layer.adapter.magnitude
    v = layer.base.weight + 3 * b @ a
    scale = magnitude.detach() / v.norm(dim=1).detach()
    (linear(x, scale[:, None] * v, layer.base.bias)).square().sum().backward()
    for found, wanted in zip(factors(layer), (a, b), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize("method", [LoRA, DoRA, CanonicalLoRA])
def test_the_adapted_layer_starts_as_the_base_layer_which_stays_frozen(method: Any) -> None:
    model: Any = ModuleDict({"layer": Linear(5, 3)})
    x = torch.randn(7, 5)
    before = model["layer"](x)
    weight = model["layer"].weight.detach().clone()
    method(target_modules=["layer"], dim=2).attach([model])
    torch.testing.assert_close(model["layer"](x), before)
    model["layer"](x).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".adapter." in name}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    assert torch.equal(model["layer"].base.weight, weight)


@pytest.mark.parametrize("method", [LoRA, DoRA, CanonicalLoRA])
def test_merging_leaves_a_plain_layer_with_the_same_output(method: Any) -> None:
    chosen = method(target_modules=["layer"], dim=2)
    model, layer = attached(chosen)
    x = torch.randn(7, 5)
    adapted = layer(x)
    chosen.merge([model])
    assert type(model["layer"]) is Linear
    torch.testing.assert_close(model["layer"](x), adapted)


def test_an_adapted_layer_is_not_adapted_again() -> None:
    model, _ = attached(LoRA(target_modules=["layer"], dim=2))
    with pytest.raises(ValueError, match="layer: has an adapter already"):
        LoRA(target_modules=["layer"], dim=2).attach([model])


@pytest.mark.parametrize("method", [LoRA, DoRA, CanonicalLoRA])
def test_the_dtype_is_that_of_the_adapters_parameters_and_not_of_the_output(method: Any) -> None:
    model: Any = ModuleDict({"layer": Linear(5, 3, dtype=torch.bfloat16)})
    chosen = method(target_modules=["layer"], dim=2, dtype=torch.float32)
    [layer] = chosen.attach([model])
    assert {parameter.dtype for parameter in layer.adapter.parameters()} == {torch.float32}
    assert filled(layer)(torch.randn(7, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    [plain] = method(target_modules=["layer"], dim=2).attach(
        [ModuleDict({"layer": Linear(5, 3, dtype=torch.bfloat16)})]
    )
    assert {parameter.dtype for parameter in plain.adapter.parameters()} == {torch.bfloat16}


def test_dropout_zeroes_inputs_of_the_adapter_only_in_training() -> None:
    _, layer = attached(LoRA(target_modules=["layer"], dim=2, dropout=0.5))
    x = torch.ones(400, 5)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    update = layer(x) - layer.base(x)
    layer.train()
    dropped = layer(x) - layer.base(x)
    assert not torch.equal(dropped[0], dropped[1])
    # The mean over dropped inputs is the update without dropout.
    torch.testing.assert_close(dropped.mean(0), update[0], atol=1.0, rtol=0.3)


def test_problems_name_the_field_and_its_value() -> None:
    wrong = LoRA(dim=0, alpha=-1.0, dropout=1.0, target_modules=[], dtype=torch.int64)
    fields = [line.partition("=")[0] for line in wrong.problems(None)]
    assert fields == ["peft.dim", "peft.alpha", "peft.dropout", "peft.target_modules", "peft.dtype"]
    assert list(LoRA().problems(None)) == []


def gated_mlp() -> Any:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=6,
        num_attention_heads=2,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    layers: Any = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleDict({"mlp": MLP(config, layers, input_size=8, ffn_hidden_size=6)})


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("targets", [["linear_fc1_up"], ["linear_fc1_gate", "linear_fc2"]])
def test_any_part_of_a_fused_layer_can_be_adapted(targets: list[str]) -> None:
    model, x = gated_mlp(), torch.randn(4, 2, 8)
    chosen = CanonicalLoRA(target_modules=targets, dim=2)
    layers = {layer.name: filled(layer) for layer in chosen.attach([model])}
    fc1 = layers["mlp.linear_fc1"]
    [(name, part)] = fc1.adapter.parts.items()  # type: ignore[union-attr, operator]
    assert name == targets[0]
    update = x @ part.linear_in.weight.T @ part.linear_out.weight.T * part.scale
    gate, up = (fc1(x)[0] - fc1.base(x)[0]).chunk(2, dim=-1)
    changed, unchanged = (up, gate) if name == "linear_fc1_up" else (gate, up)
    torch.testing.assert_close(changed, update)
    assert not unchanged.any()
    output = model["mlp"](x)[0]
    chosen.merge([model])
    torch.testing.assert_close(model["mlp"](x)[0], output)


@pytest.mark.usefixtures("one_rank")
def test_a_fused_layer_is_named_by_its_parts() -> None:
    with pytest.raises(ValueError, match="'linear_fc1' matches no layer; did you mean 'linear_fc"):
        CanonicalLoRA(target_modules=["linear_fc1"]).attach([gated_mlp()])
    with pytest.raises(ValueError, match=r"\(there are linear_fc1_gate, linear_fc1_up, linear_fc2"):
        CanonicalLoRA(target_modules=["linear_q"]).attach([gated_mlp()])


@pytest.mark.usefixtures("one_rank")
def test_callers_read_the_base_layers_attributes() -> None:
    model = gated_mlp()
    base = model["mlp"].linear_fc2
    LoRA(target_modules=["linear_fc2"], dim=2).attach([model])
    adapted = model["mlp"].linear_fc2
    assert adapted.weight is base.weight
    assert adapted.input_size == 6
    with pytest.raises(AttributeError, match="nothing"):
        adapted.nothing  # noqa: B018
