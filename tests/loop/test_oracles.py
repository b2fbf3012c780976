"""Whole runs of a model with one weight, whose gradient and losses are fractions.

The model's output is its weight times the token losses of the data. At weight w the loss is
w * objective and the gradient the objective itself, which `loss_cells` computes exactly. Unless
a test says otherwise the learning rate is 0, so that each step can train on other cells.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, override

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config import ConfigContainer, SchedulerConfig, TrainConfig
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.evaluate import evaluate
from bridge.training.loss_reduction import local, maximum, mean, total
from bridge.training.losses import masked_token_loss
from bridge.training.pretrain import TrainResult, pretrain
from loss_cells import (
    CASES,
    SLOTS,
    TOKEN_MEAN,
    Cells,
    Microbatch,
    Normalization,
    microbatches_of,
    objective,
    random_cells,
    world_size,
)
from ranks import RankFailure, run_ranks
from training_runs import a_run, one_step, own_run, rows

WEIGHT = 3.0
NAN = float("nan")


def close(value: Fraction | float) -> Any:
    """Equal to float32 precision: a sum of integers that is scaled and divided."""
    return pytest.approx(float(value), rel=3e-7, abs=0)


class OneWeight(MegatronModule):
    """A weight times what comes in; with a pipeline each stage has one, WEIGHT the last."""

    def __init__(self, config: TransformerConfig, first: bool, last: bool) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = first, last
        self.share_embeddings_and_output_weights = False
        self.weight = torch.nn.Parameter(torch.tensor([WEIGHT if last else 1.0]))
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor]) -> None:
        self.received = tensors[0]

    @override
    def forward(self, losses: torch.Tensor) -> torch.Tensor:
        if not self.pre_process:
            assert self.received is not None
            losses = self.received
        return self.weight * losses


@dataclass(kw_only=True)
class OneWeightConfig(TransformerConfig):
    """The section that builds `OneWeight`, under the layout that it names."""

    num_layers: int = 2
    hidden_size: int = 1
    num_attention_heads: int = 1
    seq_length: int = SLOTS

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        return OneWeight(copy.copy(self), pre_process, post_process)


@dataclass(kw_only=True)
class CellData:
    """One sample a microbatch; validation has the same ones as training."""

    microbatches: list[Microbatch]

    def build(self, request: DataRequest) -> DataSplits:
        samples = [sample_of(index, cells) for index, cells in enumerate(self.microbatches)]
        return DataSplits(train=samples, validation=samples, shuffle=False)


def sample_of(seed: int, microbatch: Microbatch) -> dict[str, torch.Tensor]:
    """Integer token losses [context, SLOTS] at scattered valid positions, with junk elsewhere."""
    draw = random.Random(seed)
    losses = torch.full((len(microbatch), SLOTS), 1e6)
    mask = torch.zeros(len(microbatch), SLOTS)
    for shard, (loss_sum, tokens) in enumerate(microbatch):
        for index, position in enumerate(draw.sample(range(SLOTS), tokens)):
            losses[shard, position] = (loss_sum + index) // tokens
            mask[shard, position] = 1.0
    return {"losses": losses, "mask": mask}


def forward_step(
    loss_function: Callable[[torch.Tensor, torch.Tensor], Any],
    data_iterator: Iterator[Any],
    model: Any,
) -> Any:
    """Run the model on this rank's shard."""
    batch, shard = next(data_iterator), parallel_state.get_context_parallel_rank()
    losses, mask = (batch[name][0, shard].reshape(SLOTS, 1, 1) for name in ("losses", "mask"))
    return model(losses), partial(loss_function, mask)


def sum_and_count(mask: torch.Tensor, output: torch.Tensor) -> Any:
    """Pattern 2, of an output that is NaN where it is masked."""
    poison = torch.where(mask == 0, NAN, 0.0)
    loss_sum, num_tokens, metrics = masked_token_loss(mask, output + poison)
    return loss_sum, num_tokens, {**metrics, **more_metrics(loss_sum)}


def product_and_count(mask: torch.Tensor, output: torch.Tensor) -> Any:
    """Pattern 2 as many write it: without a token its gradient is 0 times what comes back."""
    loss_sum, num_tokens = (output * mask).sum(), mask.sum().int()
    report = torch.stack((loss_sum.detach(), num_tokens))
    return loss_sum, num_tokens, {"lm loss": report, **more_metrics(loss_sum)}


def more_metrics(loss_sum: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss itself, and a mean with another denominator than the loss's."""
    per_slot = torch.stack((loss_sum.detach(), torch.tensor(float(SLOTS))))
    return {"sum": loss_sum.detach(), "per slot": per_slot}


def own_mean(mask: torch.Tensor, output: torch.Tensor) -> Any:
    """Pattern 1: the mean over the tokens of the shard."""
    loss_sum, num_tokens, metrics = sum_and_count(mask, output)
    loss = loss_sum / num_tokens.clamp(min=1)
    return loss, {**metrics, "lm loss": loss.detach()}


def mean_as_sum(mask: torch.Tensor, output: torch.Tensor) -> Any:
    """A mean in the place of pattern 2's sum: a mistake that looks like any other sum."""
    loss, metrics = own_mean(mask, output)
    return loss, mask.sum().int(), {}


LOSS_FUNCTIONS = {1: own_mean, 2: sum_and_count}


@dataclass
class Seen:
    """A callback that keeps what every step computed."""

    gradients: list[float] = field(default_factory=list)
    """Of this stage's weight, before clipping; on the rank that holds it reduced."""
    norms: list[float] = field(default_factory=list)
    metrics: list[dict[str, float | None]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """After the step."""

    def on_before_optimizer_step(self, context: Any) -> None:
        if (
            context.pg_collection.dp_cp.rank() == 0
            or not context.config.ddp.use_distributed_optimizer
        ):
            (weight,) = context.model[0].parameters()
            self.gradients.append(weight.main_grad.item())

    def on_step_end(self, context: Any, result: Any) -> None:
        self.norms.append(float(result.grad_norm))
        self.metrics.append(dict(result.metrics))
        (weight,) = context.model[0].parameters()
        self.weights.append(weight.item())


def config_of(
    directory: Path,
    microbatches: Sequence[Microbatch],
    normalization: Normalization = "token",
    *,
    batch: int,
    pipeline: int = 1,
) -> ConfigContainer:
    """Return a run over `microbatches`, of which `batch` make a step."""
    context = len(microbatches[0])
    return own_run(
        directory,
        model=OneWeightConfig(
            seq_length=SLOTS * context,
            context_parallel_size=context,
            pipeline_model_parallel_size=pipeline,
            pipeline_dtype=torch.float32,
        ),
        dataset=CellData(microbatches=list(microbatches)),
        train=TrainConfig(
            train_iters=len(microbatches) // batch,
            global_batch_size=batch,
            loss_normalization=normalization,
        ),
        optimizer=OptimizerConfig(lr=0.0, min_lr=0.0, weight_decay=0.0, clip_grad=1.0),
    )


def run_of(
    directory: Path,
    steps: Sequence[Cells],
    normalization: Normalization = "token",
    loss_function: Callable[..., Any] = sum_and_count,
) -> tuple[Seen, TrainResult]:
    """Pretrain one step on each of `steps`, which are of one shape."""
    microbatches = [microbatch for cells in steps for microbatch in microbatches_of(cells)]
    config = config_of(
        directory, microbatches, normalization, batch=len(microbatches) // len(steps)
    )
    # Plain DDP, so that each rank holds the whole gradient.
    config.ddp.use_distributed_optimizer = False
    config.ddp.overlap_param_gather = config.ddp.overlap_grad_reduce = False
    seen = Seen()
    result = pretrain(config, partial(forward_step, loss_function), [seen])
    return seen, result


@pytest.mark.parametrize("case", CASES)
def test_a_run_finds_the_oracles_fractions(tmp_path: Path, case: str) -> None:
    cells, want = CASES[case], TOKEN_MEAN[case]

    def body() -> tuple[Seen, Any]:
        seen, result = run_of(tmp_path / "run", [cells])
        return seen, result.validation

    for seen, validation in run_ranks(world_size(cells), body):
        assert seen.gradients == [close(want or 0)]
        assert seen.norms == [close(want or 0)]
        for found in (seen.metrics[0], validation):
            assert found["lm loss"] == (None if want is None else close(WEIGHT * want))
    (row, evaluated) = rows(tmp_path / "run")
    assert row["lm loss"] == evaluated["validation/lm loss"]
    assert row["lm loss"] == (None if want is None else close(WEIGHT * want))


LAYOUTS = {
    "one rank": (1, 1, 1),
    "data": (2, 1, 1),
    "context": (1, 2, 1),
    "data and context": (2, 2, 1),
    "pipeline": (1, 1, 2),
}
MODES: list[tuple[Normalization, int]] = [
    ("token", 2),
    ("token", 1),
    ("microbatch", 2),
    ("microbatch", 1),
]


def many_steps(
    directory: Path,
    steps: Sequence[Cells],
    normalization: Normalization,
    pattern: int,
    pipeline: int,
) -> tuple[Seen, dict[str, float | None]]:
    """Take a step on each of `steps`, whatever its size, and evaluate on all of them."""
    microbatches = [microbatch for cells in steps for microbatch in microbatches_of(cells)]
    data = len(steps[0])
    config = config_of(directory, microbatches, normalization, batch=4 * data, pipeline=pipeline)
    seen = Seen()
    step = partial(forward_step, LOSS_FUNCTIONS[pattern])
    with a_run(config, step, [seen]) as run:
        data_iterator = run.parts.data.training(0)
        for cells in steps:
            result = one_step(
                run,
                data_iterator=data_iterator,
                num_microbatches=len(cells[0]),
                reducer=run.parts.reducer,
                before_optimizer_step=run.before_optimizer_step,
            )
            seen.on_step_end(run.context, result)
        evaluated = evaluate(
            run.parts.forward_step,
            run.parts.data.training(0),
            run.parts.model,
            run.parts.state,
            num_samples=len(microbatches),
            pg_collection=run.parts.ranks.pg_collection,
            reducer=run.parts.reducer,
        )
    return seen, dict(evaluated.metrics)


def expected_metrics(
    microbatches: Sequence[Microbatch], normalization: Normalization, pattern: int
) -> dict[str, Any]:
    cells = [cell for microbatch in microbatches for cell in microbatch]
    mean_sum = Fraction(sum(loss_sum for loss_sum, _ in cells), len(cells))
    without_tokens = pattern == 2 and not any(tokens for _, tokens in cells)
    loss = objective(microbatches, normalization, pattern)
    return {
        "lm loss": None if without_tokens else close(WEIGHT * loss),
        "sum": close(WEIGHT * mean_sum),
        "per slot": close(WEIGHT * mean_sum / SLOTS),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_cells_give_the_objective(tmp_path: Path, layout: str) -> None:
    """Also in steps and in a last window of evaluation that are shorter than the run's own."""
    data, context, pipeline = LAYOUTS[layout]
    sizes = [1, 2, 4, 4, 2, 1, 1]
    steps = [random_cells(seed, data, size, context) for seed, size in enumerate(sizes)]

    def body() -> list[tuple[Seen, dict[str, float | None]]]:
        return [
            many_steps(
                tmp_path / f"{normalization}{pattern}", steps, normalization, pattern, pipeline
            )
            for normalization, pattern in MODES
        ]

    results = run_ranks(data * context * pipeline, body)
    for rank, of_rank in enumerate(results):
        # The first of two stages has weight 1, and its gradient the last one's factor WEIGHT.
        first_of_two = pipeline == 2 and rank == 0
        slope = WEIGHT if first_of_two else 1.0
        norm_slope = math.hypot(1.0, WEIGHT) if pipeline == 2 else 1.0
        for (normalization, pattern), (seen, evaluated) in zip(MODES, of_rank, strict=True):
            wants = [objective(microbatches_of(cells), normalization, pattern) for cells in steps]
            if seen.gradients or rank == 0:
                assert seen.gradients == [close(slope * want) for want in wants]
            assert seen.norms == [close(norm_slope * want) for want in wants]
            for cells, metrics in zip(steps, seen.metrics, strict=True):
                assert metrics == expected_metrics(microbatches_of(cells), normalization, pattern)
            everything = [microbatch for cells in steps for microbatch in microbatches_of(cells)]
            assert evaluated == expected_metrics(everything, normalization, pattern)
        # To the last bit: what a rank decides by a metric, every rank decides.
        for (seen, evaluated), (seen0, evaluated0) in zip(of_rank, results[0], strict=True):
            assert (seen.metrics, seen.norms, evaluated) == (
                seen0.metrics,
                seen0.norms,
                evaluated0,
            )


def empty_where(cells: Cells, is_empty: Callable[[int, int, int], bool]) -> Cells:
    """Take the tokens from the cells at which `is_empty(data, microbatch, context)`."""
    return [
        [
            [(0, 0) if is_empty(d, m, c) else cell for c, cell in enumerate(microbatch)]
            for m, microbatch in enumerate(replica)
        ]
        for d, replica in enumerate(cells)
    ]


@pytest.mark.parametrize("loss_function", [sum_and_count, product_and_count])
@pytest.mark.parametrize("normalization", ["token", "microbatch"])
def test_cells_without_tokens_change_nothing(
    tmp_path: Path, normalization: Normalization, loss_function: Callable[..., Any]
) -> None:
    full: Cells = [[[(6, 2), (4, 4)], [(9, 1), (7, 3)]], [[(10, 5), (3, 3)], [(8, 16), (1, 1)]]]
    empty: list[Callable[[int, int, int], bool]] = [
        lambda d, m, c: (d, m, c) == (0, 0, 0),  # a shard of one microbatch
        lambda d, m, c: (d, m) == (1, 1),  # one microbatch
        lambda d, m, c: m == 0,  # the first microbatch everywhere
        lambda d, m, c: (d, c) == (1, 0),  # one rank
        lambda d, m, c: c == 1,  # one shard everywhere
        lambda d, m, c: d == 0,  # one replica
        lambda d, m, c: True,
        lambda d, m, c: False,
    ]
    steps = [empty_where(full, is_empty) for is_empty in empty]

    def body() -> tuple[Seen, int]:
        seen, result = run_of(tmp_path / "run", steps, normalization, loss_function)
        return seen, result.step

    for seen, count in run_ranks(4, body):
        assert count == len(steps)
        wants = [objective(microbatches_of(cells), normalization, 2) for cells in steps]
        assert seen.gradients == [close(want) for want in wants]
        assert seen.norms == [close(want) for want in wants]
        for cells, metrics in zip(steps, seen.metrics, strict=True):
            assert metrics == expected_metrics(microbatches_of(cells), normalization, 2)
        assert seen.metrics[6] == {"lm loss": None, "sum": 0.0, "per slot": 0.0}
        assert seen.weights == [WEIGHT] * len(steps)
    assert [row["step"] for row in rows(tmp_path / "run")] == [*range(1, 9), 8]


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_run_logs_each_kind_of_metric_as_it_is_declared(tmp_path: Path, pipeline: int) -> None:
    microbatches: list[Microbatch] = [[(12, 4)], [(8, 1)], [(30, 12)], [(6, 3)]]

    def declaring(mask: torch.Tensor, output: torch.Tensor) -> Any:
        loss_sum, num_tokens, _ = product_and_count(mask, output)
        kinds = {"maximum": maximum, "total": total, "mean": mean, "local": local}
        metrics = {key: kind(loss_sum.detach()) for key, kind in kinds.items()}
        if num_tokens < 4:
            metrics["of few"] = mean(loss_sum.detach())
        return loss_sum, num_tokens, metrics

    def body() -> dict[str, float | None]:
        config = config_of(tmp_path / "run", microbatches, batch=4, pipeline=pipeline)
        seen = Seen()
        pretrain(config, partial(forward_step, declaring), [seen])
        return seen.metrics[0]

    want = {"maximum": 90.0, "total": 168.0, "mean": 42.0, "of few": 21.0}
    # Two replicas have their own; an earlier stage, which has none, that of the last.
    own = [63.0, 21.0] if pipeline == 1 else [42.0, 42.0]
    assert run_ranks(2, body) == [{**want, "local": value} for value in own]
    logged = rows(tmp_path / "run")[0]
    assert {**want, "local": own[0]}.items() <= logged.items()


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
def test_a_loss_that_is_normalized_already_is_left_alone_at_any_number_of_microbatches(
    tmp_path: Path, normalization: Normalization
) -> None:
    def body() -> list[Seen]:
        return [
            run_of(tmp_path / f"{count}", [[[[(8, 5)]] * count] * 2], normalization, own_mean)[0]
            for count in (1, 2, 4)
        ]

    for of_rank in run_ranks(2, body):
        assert [seen.gradients for seen in of_rank] == [[close(1.6)]] * 3
        assert [seen.metrics[0]["lm loss"] for seen in of_rank] == [close(WEIGHT * 1.6)] * 3


def test_a_mean_that_is_returned_as_a_sum_is_divided_again(tmp_path: Path) -> None:
    """Nothing tells it from a sum; LossFunction's documentation says so."""

    def body() -> Seen:
        return run_of(tmp_path / "run", [CASES["A"]], loss_function=mean_as_sum)[0]

    (seen,) = run_ranks(1, body)
    want = Fraction(2 + 10, 1 + 9)
    assert seen.gradients == [close(want)]
    assert seen.metrics == [{"loss": close(WEIGHT * want)}]


@pytest.mark.parametrize("layout", [(1, 4, 1), (2, 2, 1), (1, 2, 2)])
def test_the_update_is_clipped_by_the_norm_of_the_objectives_gradient(
    tmp_path: Path, layout: tuple[int, int, int]
) -> None:
    data, microbatches, context = layout
    cut = iter([(12, 4), (30, 12), (8, 1), (6, 3)])
    cells = [
        [[next(cut) for _ in range(context)] for _ in range(microbatches)] for _ in range(data)
    ]

    def body() -> Seen:
        config = config_of(tmp_path / "run", microbatches_of(cells), batch=data * microbatches)
        config.optimizer = OptimizerConfig(
            optimizer="sgd", sgd_momentum=0.0, lr=0.25, weight_decay=0.0, clip_grad=0.7
        )
        config.scheduler = SchedulerConfig(lr_decay_style="constant")
        config.ddp.use_distributed_optimizer = config.ddp.overlap_param_gather = False
        seen = Seen()
        pretrain(config, partial(forward_step, sum_and_count), [seen])
        return seen

    for seen in run_ranks(data * context, body):
        assert seen.norms == [close(2.8)]
        # megatron-core adds 1e-6 to the norm that it divides by.
        assert seen.weights == [pytest.approx(WEIGHT - 0.25 * 2.8 * 0.7 / (2.8 + 1e-6), rel=1e-6)]


def test_a_microbatch_is_drawn_when_the_one_before_is_done(tmp_path: Path) -> None:
    """The count is known at the end of the step: no batch is held back until then."""
    events: list[str] = []

    def counting(data_iterator: Iterator[Any], model: Any) -> Any:
        output, loss_function = forward_step(sum_and_count, data_iterator, model)
        if output.requires_grad:
            events.append("forward")
            output.register_hook(lambda gradient: events.append("backward"))
        return output, loss_function

    class Drawn(CellData):
        @override
        def build(self, request: DataRequest) -> DataSplits:
            splits = super().build(request)
            return DataSplits(train=Telling(splits.train), shuffle=False)

    class Telling:
        def __init__(self, samples: Any) -> None:
            self.samples = samples

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int, /) -> Any:
            events.append("draw")
            return self.samples[index]

    def body() -> list[str]:
        microbatches = microbatches_of([[[(1, 1)]] * 4])
        config = config_of(tmp_path / "run", microbatches, batch=4)
        config.dataset = Drawn(microbatches=list(microbatches))
        pretrain(config, counting)
        return events

    assert run_ranks(1, body) == [["draw", "forward", "backward"] * 4]


@dataclass(kw_only=True)
class Disagreeing(OneWeightConfig):
    """A model that chooses its own way to divide the loss, behind the configuration's back."""

    @override
    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        changed = copy.copy(self)
        changed.calculate_per_token_loss = not self.calculate_per_token_loss
        return OneWeight(changed, pre_process, post_process)


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
def test_a_model_that_divides_the_loss_in_another_way_than_the_run_is_rejected(
    tmp_path: Path, normalization: Normalization
) -> None:
    def body() -> str:
        config = config_of(tmp_path / "run", [[(1, 1)]], normalization, batch=1)
        config.model = Disagreeing()
        with pytest.raises(ValueError, match="calculate_per_token_loss") as caught:
            pretrain(config, partial(forward_step, sum_and_count))
        return str(caught.value)

    (message,) = run_ranks(1, body)
    assert f"train.loss_normalization={normalization}" in message


@pytest.mark.parametrize("data", [1, 2])
def test_a_float_count_ends_every_rank_before_the_first_backward(tmp_path: Path, data: int) -> None:
    """At one replica the other rank is an earlier stage, which waits for this one's gradient."""

    def float_count(mask: torch.Tensor, output: torch.Tensor) -> Any:
        loss_sum, num_tokens, metrics = sum_and_count(mask, output)
        output.register_hook(lambda gradient: (tmp_path / "backward").touch())
        return loss_sum, num_tokens.float(), metrics

    def body() -> None:
        config = config_of(tmp_path / "run", [[(1, 1)]] * 2, batch=2, pipeline=2 // data)
        pretrain(config, partial(forward_step, float_count))

    # A rank that ends with an error takes the others along, as a launcher's ranks do.
    with pytest.raises(RankFailure, match=r"UsageError: .* return num_tokens.to\(torch.int\)"):
        run_ranks(2, body, timeout=100)
    assert not (tmp_path / "backward").exists()
