"""Modules on separate ranks: the gradients, losses and samples of one process."""

import math
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

from bridge.mimo.data.mock import MockDatasetConfig
from bridge.mimo.sections import VisionEncoderConfig
from bridge.training.config import MixedPrecisionConfig
from bridge.training.mimo_step import forward_step
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.pretrain import pretrain
from campaigns import hand_back, options_of
from mimo_layout_runs import (
    ALONE,
    MATRIX,
    Chosen,
    MimoLayout,
    Sizes,
    Steps,
    deviations,
    run_in_layout,
    train_steps,
)
from mimo_models import mimo_run, tiny_mimo
from ranks import run_ranks
from training_runs import a_run, one_step, parameters_of, series, trained

FAN_IN = MimoLayout(vision=Sizes(data=2), language=Sizes())
FAN_OUT = MimoLayout(vision=Sizes(pipeline=2), language=Sizes(data=2))
TENSOR = MimoLayout(vision=Sizes(), language=Sizes(tensor=2))
PIPELINE = MimoLayout(vision=Sizes(), language=Sizes(pipeline=2))
PAIR = MimoLayout(vision=Sizes(), language=Sizes())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Steps]:
    """Return the steps of one process, in both normalizations."""

    def body(directory: Path) -> dict[str, Steps]:
        return {
            "token": train_steps(run_in_layout(directory / "token", ALONE)),
            "microbatch": train_steps(run_in_layout(directory / "means", ALONE, "microbatch")),
        }

    return run_ranks(1, body, tmp_path_factory.mktemp("alone"), timeout=120)[0]


IN_THE_SUITE: list[tuple[MimoLayout, Any, dict[str, Any]]] = [
    (FAN_IN, "token", {}),
    (FAN_IN, "microbatch", {}),
    (FAN_OUT, "microbatch", {}),
    (FAN_OUT, "token", {}),
    (TENSOR, "token", {"language": {"sequence_parallel": True}}),
    (PIPELINE, "token", {}),
]


ASKED = options_of("mimo_layouts")
"""The options of tools/mimo_layouts.py; None in the suite."""


def cases() -> list[tuple[MimoLayout, Any, dict[str, Any]]]:
    """Return layouts, normalizations and fields of the model."""
    if ASKED is None:
        return IN_THE_SUITE
    return [
        (layout, normalization, {})
        for normalization in ("token", "microbatch")
        for layout in MATRIX
        if layout.ranks <= ASKED["ranks"]
    ]


@pytest.mark.parametrize(
    ("layout", "normalization", "fields"),
    cases(),
    ids=lambda value: value.name if isinstance(value, MimoLayout) else str(value),
)
def test_gradients_are_those_of_one_process(
    layout: MimoLayout,
    normalization: Any,
    fields: dict[str, Any],
    alone: dict[str, Steps],
    tmp_path: Path,
) -> None:
    def body() -> Steps:
        config = run_in_layout(tmp_path / "run", layout, normalization, **fields)
        config.ddp.bucket_size = 1000
        return train_steps(config)

    everyone = run_ranks(layout.ranks, body, timeout=120 if ASKED is None else 300)
    found = deviations(everyone[0], alone[normalization])
    hand_back(normalization=normalization, layout=layout.name, ranks=layout.ranks, **asdict(found))
    assert {tuple(found.losses) for found in everyone} == {tuple(everyone[0].losses)}
    assert {tuple(found.grad_norms) for found in everyone} == {tuple(everyone[0].grad_norms)}
    assert max(astuple(found)) < (2e-6 if ASKED is None else 1e-5)


class Trace:
    """A forward step that records the samples that a rank reads."""

    def __init__(self) -> None:
        self.samples: list[list[int]] = []

    def forward_step(self, state: Any, data_iterator: Any, model: Any) -> Any:
        def recorded() -> Any:
            for microbatch in data_iterator:
                self.samples.append(microbatch["position_ids"][:, 0].tolist())
                yield microbatch

        return forward_step(state, recorded(), model)


def test_every_module_sees_the_samples_of_the_same_global_microbatch(tmp_path: Path) -> None:
    """The position of a sample's first token is its number; each rank reads its shard alone."""

    def body() -> Any:
        config = run_in_layout(tmp_path / "run", MimoLayout(vision=Sizes(data=4), language=Sizes()))
        config.dataset = Chosen([1, 0] * 20, numbered=True)
        config.train.train_iters = 2
        trace = Trace()
        with a_run(config, trace.forward_step) as run:
            for _ in range(2):
                one_step(run)
        return trace.samples

    *vision, language = run_ranks(5, body, timeout=120)
    assert [len(microbatch) for microbatch in language] == [4] * 8
    assert [number for microbatch in language for number in microbatch] == list(range(32))
    for step, microbatch in enumerate(language):
        assert [part for rank in vision for part in rank[step]] == microbatch


def test_text_alone_and_images_alone_train(tmp_path: Path) -> None:
    def body(name: str, layout: MimoLayout, images: list[int]) -> Any:
        config = run_in_layout(tmp_path / name, layout)
        config.dataset = Chosen(images)
        return train_steps(config, steps=2)

    for kind, images in (("text", [0] * 16), ("images", [2, 1] * 8)):
        (expected,) = run_ranks(1, body, f"{kind} alone", ALONE, images, timeout=120)
        found = run_ranks(3, body, kind, FAN_IN, images, timeout=120)[0]
        assert found.losses == pytest.approx(expected.losses, rel=1e-6)
        encoder = [g for name, g in found.gradients.items() if "modality" in name]
        assert any(g.any() for g in encoder) == (kind == "images")
        assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


def test_each_of_several_encoders_has_ranks_of_its_own(tmp_path: Path) -> None:
    def config(name: str, **fields: Any) -> Any:
        model = tiny_mimo(special_token_ids={"vision": -7, "depth": -8}, **fields)
        model.encoders["depth"] = VisionEncoderConfig(
            num_layers=1,
            num_attention_heads=2,
            hidden_size=8,
            image_size=4,
            patch_size=4,
            num_channels=2,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
        model.language.seq_length = 16
        made = mimo_run(tmp_path / name, model)
        made.dataset = MockDatasetConfig(size=64, validation_size=0, min_images=0, max_images=2)
        made.train.train_iters = 3
        return made

    def body(name: str, fields: dict[str, Any]) -> Any:
        return pretrain(config(name, **fields), forward_step) and None

    run_ranks(1, body, "one", {}, timeout=120)
    separate = {"placement": "separate", "parallelism": {}}
    run_ranks(3, body, "three", separate, timeout=120)
    for name in ("lm loss", "grad_norm"):
        expected = series(tmp_path / "one", name)
        assert series(tmp_path / "three", name) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("frozen", "prefixes"),
    [
        (["vision.encoder"], ["modality_submodules.vision.encoders."]),
        (["vision"], ["modality_submodules."]),
        (["language"], ["language_model."]),
    ],
    ids=["encoder", "modality", "language"],
)
def test_frozen_modules_stay_and_others_learn_at_their_rates(
    frozen: list[str], prefixes: list[str], tmp_path: Path
) -> None:
    """Rely on Adam's first step, which is the learning rate whatever the gradient."""
    rates = {"vision.encoder": 0.5, "vision.projection": 2.0, "language": 0.25}

    def body() -> Any:
        config = run_in_layout(tmp_path / "run", PAIR, freeze=frozen, lr_multipliers=rates)
        config.optimizer = OptimizerConfig(
            lr=0.01, min_lr=0.01, weight_decay=0.0, adam_eps=1e-30, clip_grad=0.0
        )
        config.scheduler.lr_warmup_fraction = None
        with a_run(config, forward_step) as run:
            before = parameters_of(run.parts.model)
            # A step whose gradients are too large is skipped on every rank.
            run.parts.optimizer.config.grad_norm_skip_threshold = 1e-9
            assert one_step(run).skipped
            run.parts.optimizer.config.grad_norm_skip_threshold = math.inf
            result = one_step(run)
            with parameters_in_sync(run.parts.model):
                after = parameters_of(run.parts.model)
        moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
        return result.learning_rate, moved

    everyone = run_ranks(2, body, timeout=120)
    moved = {name: value for _, of_rank in everyone for name, value in of_rank.items()}
    assert {rate for rate, _ in everyone} == {0.01}
    parts = {
        "modality_submodules.vision.encoders.": 0.005,
        "modality_submodules.vision.input_projections.": 0.02,
        "language_model.": 0.0025,
    }
    for part, rate in parts.items():
        found = [value for name, value in moved.items() if name.startswith(part)]
        expected = 0.0 if part.startswith(tuple(prefixes)) else rate
        assert found == pytest.approx([expected] * len(found), rel=1e-3), part


def test_a_run_resumes_bit_for_bit_and_its_weights_load_under_the_other_placement(
    tmp_path: Path,
) -> None:
    layout = MimoLayout(vision=Sizes(data=2), language=Sizes(pipeline=2))

    def config(name: str) -> Any:
        made = run_in_layout(tmp_path / name, layout)
        made.train.train_iters = 4
        made.checkpoint.save_interval = 2
        made.checkpoint.keep_last = 0
        # Several buckets in each module's gradient buffer, with padding.
        made.ddp.bucket_size = 1000
        return made

    def twice() -> Any:
        uninterrupted = trained(config("uninterrupted"), forward_step)[1]
        first = config("in two")
        first.train.train_iters, first.scheduler.lr_decay_iters = 2, 4
        pretrain(first, forward_step)
        second = config("in two")
        second.scheduler.lr_decay_iters, second.checkpoint.resume = 4, True
        continued = trained(second, forward_step)[1]
        return uninterrupted, continued

    def from_there() -> Any:
        made = run_in_layout(tmp_path / "colocated", ALONE)
        made.checkpoint.pretrained_checkpoint = str(
            tmp_path / "uninterrupted" / "checkpoints" / "step-0000004"
        )
        with a_run(made, forward_step) as run:
            return parameters_of(run.parts.model)

    everyone = run_ranks(layout.ranks, twice, timeout=120)
    for uninterrupted, continued in everyone:
        assert uninterrupted.keys() == continued.keys()
        assert all(torch.equal(continued[name], weight) for name, weight in uninterrupted.items())
    (loaded,) = run_ranks(1, from_there, timeout=120)
    encoder = {name: weight for name, weight in everyone[0][0].items() if "modality" in name}
    assert encoder
    for name, weight in encoder.items():
        assert torch.equal(loaded[name], weight), name


def test_a_run_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    def body() -> Any:
        groups = len(dist.distributed_c10d._world.pg_map)
        pretrain(run_in_layout(tmp_path / "run", PAIR), forward_step)
        return (
            len(dist.distributed_c10d._world.pg_map) - groups,
            parallel_state._GLOBAL_MEMORY_BUFFER,
            {**BridgeCommunicator._bridge_pg_cache, **BridgeCommunicator._broadcast_pg_cache},
        )

    assert run_ranks(2, body, timeout=60) == [(0, None, {})] * 2


def test_bf16_stays_near_fp32(alone: dict[str, Steps], tmp_path: Path) -> None:
    def body() -> Steps:
        config = run_in_layout(tmp_path / "run", PAIR)
        config.mixed_precision = MixedPrecisionConfig(precision="bf16")
        return train_steps(config)

    found = run_ranks(2, body, timeout=120)[0]
    assert found.losses == pytest.approx(alone["token"].losses, rel=2e-2)
    assert found.losses != alone["token"].losses
