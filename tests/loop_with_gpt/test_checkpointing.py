"""Checkpoints: a run that was saved and continued equals the uninterrupted one, bit for bit."""

import hashlib
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, override

import numpy as np
import pytest
import torch

from bridge.training.config import ConfigContainer
from bridge.training.gpt_step import forward_step as gpt_forward_step
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.pretrain import pretrain
from bridge.training.run_files.directory import RunDirectory
from bridge.training.state import GlobalState
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import (
    Killed,
    Killer,
    OwnData,
    OwnModel,
    Weights,
    gpt_run,
    own_run,
    parameters_of,
    rows,
    token_step,
    trained,
)

STEPS = 6
TIMES = {"step_time_s", "tokens_per_s", "samples_per_s"}


class Everything:
    """A callback that keeps all that a resume restores: parameters, counters, random streams."""

    def __init__(self) -> None:
        self.parameters: dict[str, bytes] = {}
        self.state: dict[str, Any] = {}
        self.streams: list[str] = []

    def on_train_end(self, context: Any) -> None:
        if context.exception is not None:
            return
        with parameters_in_sync(context.model):
            self.parameters = {
                name: value.float().numpy().tobytes()
                for name, value in parameters_of(context.model).items()
            }
        self.state = asdict(context.state.train_state)
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        streams = [
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state().numpy(),
            torch.cuda.get_rng_state().numpy(),
            {name: s.numpy() for name, s in get_cuda_rng_tracker().get_states().items()},
        ]
        self.streams = [hashlib.sha256(pickle.dumps(stream)).hexdigest() for stream in streams]


def noisy_step(data_iterator: Any, model: Any) -> Any:
    """Draw from every stream of the host in each microbatch."""
    output, loss_function = token_step(data_iterator, model)
    noise = 1 + 0.1 * (float(torch.randn(())) + random.random() + np.random.rand())
    return output, lambda out: loss_function(out * noise)


def own(directory: Path) -> tuple[ConfigContainer, Callable[..., Any]]:
    # An epoch ends with the step that is saved.
    config = own_run(directory, model=OwnModel(dropout=0.3), dataset=OwnData(train=18))
    config.train.global_batch_size, config.train.micro_batch_size = 6, 1
    config.train.num_workers = 2
    # Each parameter in a bucket of its own, with padding.
    config.ddp.bucket_size = 1
    return config, noisy_step


def gpt(**layout: Any) -> Callable[[Path], tuple[ConfigContainer, Callable[..., Any]]]:
    model = tiny_gpt(hidden_dropout=0.2, attention_dropout=0.1, **layout)
    return lambda directory: (gpt_run(directory, model), gpt_forward_step)


RUNS: dict[str, Callable[[Path], tuple[ConfigContainer, Callable[..., Any]]]] = {
    "data, on 3 ranks with 2 workers": own,
    "tensor": gpt(num_layers=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "interleaved": gpt(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, kind: str) -> None:
    def body(directory: Path, killed_at: int, resume: bool) -> Everything:
        config, step = RUNS[kind](directory)
        config.train.train_iters = STEPS
        config.dataset.validation = 4  # type: ignore[attr-defined]
        config.validation.eval_interval = 2
        config.checkpoint.save_interval = 3
        config.checkpoint.resume = resume
        everything = Everything()
        try:
            pretrain(config, step, [everything, Killer(killed_at)])
        except Killed:
            assert killed_at
        return everything

    ranks = 3 if kind.startswith("data") else 2
    whole = run_ranks(ranks, body, tmp_path / "whole", 0, False, timeout=120)
    run_ranks(ranks, body, tmp_path / "cut", 5, False, timeout=120)
    assert rows(tmp_path / "cut")[-1]["step"] == 4
    continued = run_ranks(ranks, body, tmp_path / "cut", 0, True, timeout=120)
    for one, other in zip(whole, continued, strict=True):
        assert one.parameters
        assert one.parameters == other.parameters
        assert one.state["step"] == STEPS
        assert one.state == other.state
        assert one.streams == other.streams
    texts = [
        [{key: value for key, value in row.items() if key not in TIMES} for row in rows(run)]
        for run in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert texts[0] == texts[1]
    assert [row["step"] for row in texts[0]] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def saving_run(directory: Path, **checkpoint: Any) -> ConfigContainer:
    config = own_run(directory)
    for name, value in ({"save_interval": 2} | checkpoint).items():
        setattr(config.checkpoint, name, value)
    return config


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_a_run_that_dies_before_latest_is_replaced_continues_from_the_one_before(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"

    def dies() -> None:
        publish = RunDirectory.publish

        def dies_before_publishing(directory: RunDirectory, checkpoint: Path) -> None:
            if checkpoint.name.endswith("4"):
                # The checkpoint is complete, and `latest` does not name it yet.
                assert (checkpoint / ".metadata").exists()
                assert (checkpoint / "config.yaml").exists()
                raise Killed
            publish(directory, checkpoint)

        RunDirectory.publish = dies_before_publishing  # type: ignore[assignment,method-assign]
        with pytest.raises(Killed):
            pretrain(saving_run(run), token_step)

    def continues() -> list[Any]:
        config = saving_run(run, resume=True, save_interval=1, keep_last=1)
        seen = []

        class Listen:
            def on_train_start(self, context: Any) -> None:
                seen.append(context.state.train_state.step)

            def on_checkpoint_save(self, context: Any, path: Path) -> None:
                seen.append((path.name, RunDirectory(run).latest() == path))

        pretrain(config, token_step, [Listen()])
        return seen

    run_ranks(1, dies, timeout=120)
    assert RunDirectory(run).latest() == run / "checkpoints" / "step-0000002"
    assert names(run) == ["latest", "step-0000002", "step-0000004"]
    (run / "checkpoints" / "step-0000003.partial").mkdir()
    (run / "checkpoints" / "step-0000003.partial" / "torn").touch()
    assert run_ranks(1, continues, timeout=120) == [
        [2, ("step-0000003", True), ("step-0000004", True), ("step-0000005", True)]
    ]
    assert names(run) == ["latest", "step-0000005"]


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(0, [1, 2, 3, 4, 5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    config = saving_run(tmp_path / "run", save_interval=1, keep_last=keep_last, save_at_end=True)
    run_ranks(1, lambda: pretrain(config, token_step) and None, timeout=120)
    assert names(tmp_path / "run") == ["latest", *(f"step-{step:07d}" for step in kept)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of `OwnModel` with checkpoints after steps 2 and 4."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(1, lambda: pretrain(saving_run(run), token_step) and None, timeout=120)
    return run


def message_of(config: ConfigContainer) -> str:
    def body() -> str:
        with pytest.raises(ValueError, match="step-0000004") as error:
            pretrain(config, token_step)
        return str(error.value)

    return run_ranks(1, body, timeout=120)[0]


def copied(saved: Path, place: Path) -> Path:
    return Path(shutil.copytree(saved, place))


@pytest.mark.parametrize("how", ["resume", "pretrained_checkpoint"])
@pytest.mark.parametrize("layers", ["wider", "deeper"])
def test_a_checkpoint_of_another_model_is_rejected_by_its_path(
    tmp_path: Path, saved: Path, how: str, layers: str
) -> None:
    class Wider(OwnModel):
        @override
        def build(self, **arguments: Any) -> torch.nn.Module:  # type: ignore[override]
            return OwnModel(width=7).build(**arguments)

    class Deeper(OwnModel):
        @override
        def build(self, **arguments: Any) -> torch.nn.Module:  # type: ignore[override]
            module = super().build(**arguments)
            module.more = torch.nn.Linear(2, 2)
            return module

    if how == "resume":
        config = saving_run(copied(saved, tmp_path / "run"), resume=True)
    else:
        config = saving_run(tmp_path / "run", pretrained_checkpoint=str(saved))
    model: Any = Wider() if layers == "wider" else Deeper()
    config.model = model
    message = message_of(config)
    assert "fit the model" in message
    assert (tmp_path / "run").exists() == (how == "resume")


def test_a_run_does_not_continue_on_data_in_another_order(tmp_path: Path, saved: Path) -> None:
    config = saving_run(copied(saved, tmp_path / "run"), resume=True)
    # The checkpoint knows it too.
    (tmp_path / "run" / "config.yaml").unlink()
    config.dataset = OwnData(train=25)
    assert re.search("24 samples.*25 samples", message_of(config))
    config.dataset = OwnData()
    config.rng.seed = 8
    assert re.search("seed 7.*seed 8", message_of(config))


@pytest.mark.parametrize("damage", [".metadata", "metadata.json", "*.distcp"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(
    tmp_path: Path, saved: Path, damage: str
) -> None:
    run = copied(saved, tmp_path / "run")
    found = list((run / "checkpoints" / "step-0000004").glob(damage))
    assert found
    for path in found:
        os.remove(path)
    assert "damaged" in message_of(saving_run(run, resume=True))


def test_a_run_that_continues_does_not_look_for_what_it_once_started_from(
    tmp_path: Path, saved: Path
) -> None:
    run = copied(saved, tmp_path / "run")
    config = saving_run(run, resume=True, pretrained_checkpoint=str(tmp_path / "gone"))
    assert run_ranks(1, lambda: pretrain(config, token_step).step, timeout=120) == [5]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_weights_alone_are_taken_and_the_optimizers_copies_follow(
    tmp_path: Path, precision: str, distributed_optimizer: bool
) -> None:
    def run(directory: str, **checkpoint: Any) -> ConfigContainer:
        config = saving_run(tmp_path / directory, save_interval=None, **checkpoint)
        config.mixed_precision.precision = precision  # type: ignore[assignment]
        config.ddp.use_distributed_optimizer = distributed_optimizer
        config.ddp.overlap_param_gather = distributed_optimizer
        return config

    def step(data_iterator: Any, model: Any) -> Any:
        output, loss_function = token_step(data_iterator, model)
        return output, lambda out: loss_function(out.float())

    def body() -> Any:
        _, donors = trained(run("donor", save_at_end=True), step)
        config = run("taker", pretrained_checkpoint=str(tmp_path / "donor"))
        config.train.train_iters = 1
        config.optimizer.lr = config.optimizer.min_lr = 0.0
        result, takers = trained(config, step)
        assert (result.step, result.consumed_samples) == (1, 8)
        changed = [name for name in donors if not torch.equal(donors[name], takers[name])]
        dtypes = {value.dtype for value in takers.values()}
        return changed, len(donors), dtypes

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert run_ranks(2, body, timeout=120) == [([], 4, {dtype})] * 2


def experts_run(directory: Path, until: int, **layout: Any) -> ConfigContainer:
    """Return a run of 6 steps that continues its checkpoint and ends after a given step."""
    sizes = {"num_layers": 2, "num_moe_experts": 4, "moe_router_topk": 2}
    config = gpt_run(directory, tiny_gpt(**sizes, moe_grouped_gemm=False, **layout))
    # Several buckets in each gradient buffer, with padding.
    config.ddp.bucket_size = 2000
    config.train.train_iters = until
    config.scheduler.lr_decay_iters = 6
    config.checkpoint.resume = directory.exists()
    config.checkpoint.save_at_end = True
    return config


def test_a_run_continues_under_any_layout_experts_spread_or_not(tmp_path: Path) -> None:
    layouts: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (2, {"expert_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (4, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
    ]

    def train(config: ConfigContainer) -> None:
        pretrain(config, gpt_forward_step)

    run_ranks(1, train, experts_run(tmp_path / "whole", 6))
    for done, (ranks, layout) in enumerate(layouts):
        run_ranks(ranks, train, experts_run(tmp_path / "cut", done + 1, **layout))
    whole, cut = ([row["lm loss"] for row in rows(tmp_path / name)] for name in ("whole", "cut"))
    assert len(whole) == 6
    assert cut == pytest.approx(whole, rel=1e-5)


def test_without_the_distributed_optimizer_experts_stay_where_they_were(tmp_path: Path) -> None:
    def train(**layout: Any) -> str:
        config = experts_run(tmp_path / "run", 2 if layout else 1, **layout)
        config.ddp.use_distributed_optimizer = config.ddp.overlap_param_gather = False
        try:
            pretrain(config, gpt_forward_step)
        except ValueError as error:
            return str(error)
        return ""

    assert run_ranks(1, train) == [""]
    for message in run_ranks(2, lambda: train(expert_model_parallel_size=2)):
        assert "model.expert_model_parallel_size that the checkpoint was saved with" in message


def surging(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward step whose losses are huge in steps 1, 2 and 4."""

    def forward(state: GlobalState, data_iterator: Any, model: Any) -> Any:
        output, loss_function = step(state, data_iterator, model)
        factor = 1e6 if state.train_state.step in (0, 1, 3) else 1.0

        def scaled(out: torch.Tensor) -> Any:
            total, *rest = loss_function(out)
            return total * factor, *rest

        return output, scaled

    return forward


SKIPPING: dict[str, dict[str, Any]] = {
    # Each parameter has a bucket of its own, and all of it is on the first rank.
    "the distributed optimizer": {"bucket_size": 1},
    "SGD": {"use_distributed_optimizer": False, "overlap_param_gather": False},
    "experts": {},
    "fp16": {},
}


def skipping_run(directory: Path, kind: str) -> tuple[ConfigContainer, Callable[..., Any]]:
    """Return a run that skips its steps 1, 2 and 4."""
    if kind == "experts":
        sizes = {"num_layers": 1, "num_moe_experts": 2, "moe_router_topk": 2}
        model = tiny_gpt(**sizes, moe_grouped_gemm=False, expert_model_parallel_size=2)
        config, step = gpt_run(directory, model), surging(gpt_forward_step)
    else:
        config, step = own_run(directory), surging(lambda _, *arguments: token_step(*arguments))
    if kind == "fp16":
        config.mixed_precision.precision = "fp16"
        config.optimizer.initial_loss_scale, config.optimizer.hysteresis = 128.0, 1
    else:
        config.optimizer.grad_norm_skip_threshold = 1000.0
    if kind == "SGD":
        config.optimizer.optimizer = "sgd"
    for name, value in SKIPPING[kind].items():
        setattr(config.ddp, name, value)
    config.scheduler.lr_decay_iters, config.scheduler.lr_warmup_fraction = 5, 0.0
    config.checkpoint.save_at_end = True
    return config, step


@pytest.mark.parametrize("kind", SKIPPING)
def test_a_run_whose_first_steps_were_skipped_is_saved_and_continues_bit_for_bit(
    tmp_path: Path, kind: str
) -> None:
    def train(name: str, until: int, resume: bool) -> tuple[dict[str, torch.Tensor], list[int]]:
        config, step = skipping_run(tmp_path / name, kind)
        config.train.train_iters, config.checkpoint.resume = until, resume
        weights, skipped = Weights(), []

        class Listen:
            def on_step_end(self, context: Any, result: Any) -> None:
                if result.skipped:
                    skipped.append(context.state.train_state.step)

        pretrain(config, step, [weights, Listen()])
        return weights.parameters, skipped

    def both() -> Any:
        whole, skipped = train("whole", 5, False)
        before = train("cut", 2, False)[1]
        cut, after = train("cut", 5, True)
        return [name for name in whole if not torch.equal(whole[name], cut[name])], [
            skipped,
            before + after,
        ]

    ranks = 1 if kind in ("SGD", "fp16") else 2
    assert run_ranks(ranks, both, timeout=120) == [([], [[1, 2, 4], [1, 2, 4]])] * ranks
    rates = [[row["learning_rate"] for row in rows(tmp_path / name)] for name in ("whole", "cut")]
    assert len(set(rates[0])) == 2
    assert rates[0] == rates[1]
