"""Adapters train on top of a frozen GPT, the same under every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.peft import CanonicalLoRA, DoRA, LoRA
from bridge.training.gpt_step import forward_step
from bridge.training.model.frozen import trained_parameters
from bridge.training.reporting.throughput import model_flops_per_token
from bridge.training.run_files.directory import RunDirectory
from gpt_models import SEQUENCE
from peft_runs import EP, PP, SP, TP, adapted_run, train_adapters, train_bases
from ranks import RankFailure, run_ranks
from training_runs import a_run, one_step

pytestmark = pytest.mark.xdist_group("adapters")

METHODS: dict[str, Any] = {
    "lora": LoRA(dim=4),
    "dora": DoRA(dim=4, exclude_modules=["*.layers.0.mlp.*"]),
    "canonical": CanonicalLoRA(dim=4, target_modules=["linear_q", "linear_v", "linear_fc1_up"]),
    "last layer": LoRA(dim=4, target_modules=["*.layers.1.*"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def alone(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the losses and norms of one process, for each method and for experts."""
    folder = tmp_path_factory.mktemp("alone")

    def train_all() -> dict[str, Any]:
        found = {
            name: train_adapters(adapted_run(folder / name, bases["dense"], method=method))
            for name, method in METHODS.items()
        }
        found["experts"] = train_adapters(
            adapted_run(folder / "experts", bases["experts"], "experts")
        )
        return found

    [found] = run_ranks(1, train_all)
    last = [values["lm loss"][-1] for values in found.values()]
    assert len(set(last)) == len(last)
    return found


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (TP, ["lora", "dora", "canonical"]),
        (SP, [*METHODS]),
        # The first stage has no adapter of the last layer.
        (PP, ["dora", "last layer"]),
        ({}, ["lora"]),
    ],
    ids=["tp", "sp", "pp", "dp"],
)
def test_every_layout_trains_what_one_process_does(
    layout: dict[str, Any],
    names: list[str],
    bases: dict[str, Path],
    alone: dict[str, Any],
    tmp_path: Path,
) -> None:
    def train_all() -> dict[str, Any]:
        return {
            name: train_adapters(
                adapted_run(tmp_path / name, bases["dense"], method=METHODS[name], **layout)
            )
            for name in names
        }

    for name, found in run_ranks(2, train_all)[0].items():
        for metric, values in found.items():
            assert values == pytest.approx(alone[name][metric], rel=1e-5), (name, metric)


@pytest.mark.parametrize("layout", [EP, SP], ids=["ep", "etp"])
def test_experts_are_adapted_under_every_layout(
    layout: dict[str, Any], bases: dict[str, Path], alone: dict[str, Any], tmp_path: Path
) -> None:
    config = adapted_run(tmp_path / "run", bases["experts"], "experts", **layout)
    for metric, values in run_ranks(2, train_adapters, config)[0].items():
        assert values == pytest.approx(alone["experts"][metric], rel=1e-5)


RECOMPUTED: list[dict[str, Any]] = [
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
]


def test_recomputed_layers_train_behind_a_frozen_embedding(
    bases: dict[str, Path], alone: dict[str, Any], tmp_path: Path
) -> None:
    def train_all() -> list[Any]:
        return [
            train_adapters(adapted_run(tmp_path / str(number), bases["dense"], **recomputed))
            for number, recomputed in enumerate(RECOMPUTED)
        ]

    for found in run_ranks(1, train_all)[0]:
        for metric, values in found.items():
            assert values == pytest.approx(alone["lora"][metric], rel=1e-6)


def test_adapters_without_gradients_are_an_error_that_names_them(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    def without_the_remedy() -> None:
        from bridge.training.model import frozen

        frozen._recomputes = lambda chunk: False
        train_adapters(adapted_run(tmp_path / "run", bases["dense"], **RECOMPUTED[1]))

    with pytest.raises(RankFailure, match=r"parameters that train got no gradient.*linear_qkv\.ad"):
        run_ranks(1, without_the_remedy)


def test_the_base_stays_as_it_was_and_dropout_and_dtype_are_obeyed(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    config = adapted_run(
        tmp_path / "run",
        bases["dense"],
        method=LoRA(dim=4, dropout=0.2, dtype=torch.float32),
        pipeline_dtype=torch.bfloat16,
    )
    config.mixed_precision.precision = "bf16"

    def base_before_and_after() -> tuple[bool, set[torch.dtype], bool]:
        with a_run(config, forward_step) as run:
            [chunk] = run.parts.model
            frozen = {n: p for n, p in chunk.named_parameters() if not p.requires_grad}
            added = dict(trained_parameters(chunk))
            before = {name: parameter.clone() for name, parameter in frozen.items()}
            start = {name: parameter.clone() for name, parameter in added.items()}
            for _ in range(2):
                one_step(run)
            same = all(torch.equal(frozen[name], before[name]) for name in frozen)
            moved = all(not torch.equal(added[name], start[name]) for name in added)
            return same, {parameter.dtype for parameter in added.values()}, moved

    same, dtypes, moved = run_ranks(1, base_before_and_after)[0]
    assert same
    assert moved
    assert dtypes == {torch.float32}


def test_a_typo_in_the_targets_is_rejected_on_every_stage(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    config = adapted_run(
        tmp_path / "run", bases["dense"], method=LoRA(target_modules=["linear_qkw"]), **PP
    )
    with pytest.raises(RankFailure, match=r"'linear_qkw' matches no layer; did you mean 'linear_q"):
        run_ranks(2, train_adapters, config)
    assert not RunDirectory(tmp_path / "run").holds_a_run()


def test_flops_are_what_torch_counts_of_a_frozen_model(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    def count() -> tuple[float, float | None]:
        from torch.utils.flop_counter import FlopCounterMode

        with a_run(adapted_run(tmp_path / "run", bases["dense"]), forward_step) as run:
            assert run.parts.size is not None
            tokens = torch.zeros(2, SEQUENCE, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter:
                run.parts.model[0](tokens, tokens, None, labels=tokens).sum().backward()
            counts = counter.get_flop_counts()["Global"]
            products = sum(n for op, n in counts.items() if "mm" in str(op))
            computed = model_flops_per_token(
                run.parts.config.model, adapter_weights=run.parts.size.trained_per_token
            )
            return products / tokens.numel(), computed

    [(counted, computed)] = run_ranks(1, count)
    attention = 6.0 * 2 * SEQUENCE * 32
    # Behind the frozen embedding the first layer's input gets no gradient: 2 for each weight of
    # its linear_qkv, [64, 32], and of the A of its adapter, [4, 32].
    assert computed == counted + attention + 2 * (64 + 4) * 32


def test_an_experts_adapter_counts_as_often_as_a_token_meets_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    def sizes() -> Any:
        config = adapted_run(tmp_path / "run", bases["experts"], "experts", **EP)
        config.peft = LoRA(dim=4, target_modules=["*.experts.*"])
        with a_run(config, forward_step) as run:
            return run.parts.size

    size, same = run_ranks(2, sizes)
    of_an_expert = 4 * ((32 + 2 * 24) + (24 + 32))
    assert size == same
    assert size.trained == 2 * 4 * of_an_expert
    assert size.trained_per_token == 2 * 2 * of_an_expert


def test_the_bias_that_balances_experts_stays_as_it_was(tmp_path: Path) -> None:
    config = adapted_run(
        tmp_path / "run",
        None,
        "experts",
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
    )

    def biases_after_a_step() -> list[torch.Tensor]:
        with a_run(config, forward_step) as run:
            one_step(run)
            buffers = run.parts.model[0].named_buffers()
            return [buffer for name, buffer in buffers if name.endswith("expert_bias")]

    [biases] = run_ranks(1, biases_after_a_step)
    assert len(biases) == 2
    assert not any(bias.any() for bias in biases)
