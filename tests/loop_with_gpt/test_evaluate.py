"""An evaluation is the loss sum of the set over its token count, and leaves no trace."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.training.config import TrainConfig, ValidationConfig
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.gpt_step import forward_step as gpt_forward_step
from bridge.training.loss_reduction import MetricReducer
from bridge.training.pretrain import pretrain
from gpt_models import tiny_gpt
from plain_torch import plain_torch
from ranks import run_ranks
from training_runs import (
    OwnData,
    OwnModel,
    TokenData,
    TokenSamples,
    a_run,
    gpt_run,
    own_run,
    series,
    token_step,
)
from validation_sets import error_of, evaluated


@dataclass(kw_only=True)
class TwoTokenSets:
    """Two validation sets of random tokens."""

    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(
            train=TokenSamples(64),
            validation={"a": TokenSamples(4, 3000), "b": TokenSamples(8, 2000)},
        )


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_value_is_the_sum_over_the_set_by_the_tokens_of_the_set(
    tmp_path: Path, world_size: int
) -> None:
    def body() -> list[Any]:
        found = []
        for eval_iters in (None, 1, 2, 50):
            config = own_run(
                tmp_path / f"{eval_iters}",
                dataset=OwnData(validation=27),
                model=OwnModel(dropout=0.5),
                validation=ValidationConfig(eval_iters=eval_iters),
            )
            with a_run(config, token_step) as run:
                result = evaluated(run)
                counted = run.parts.state.train_state.consumed_validation_samples
                assert counted == result.samples
                found.append((result.samples, result.metrics["error"]))
        return found

    for found in run_ranks(world_size, body, timeout=120):
        assert [samples for samples, _ in found] == [27, 8, 16, 27]
        for samples, error in found:
            assert error == pytest.approx(error_of(7, 1000, samples), rel=1e-6)


def test_training_continues_as_if_there_had_been_no_evaluation(tmp_path: Path) -> None:
    """Parameters are gathered by hooks, which are off during an evaluation."""

    def body() -> None:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.validation = ValidationConfig(eval_interval=1, eval_at_start=True)
        assert config.ddp.overlap_param_gather
        pretrain(config, token_step)

    run_ranks(2, body, timeout=120)
    wanted = plain_torch(own_run(tmp_path), pattern=2, steps=5)
    assert series(tmp_path / "run", "error") == pytest.approx(wanted.losses, rel=2e-6)
    found = series(tmp_path / "run", "validation/error")
    assert len(found) == 6
    assert found[0] == pytest.approx(error_of(7, 1000, 8), rel=1e-6)
    # The first step has rate 0.
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] != found[1]


def test_every_module_is_back_in_its_mode_after_an_exception(tmp_path: Path) -> None:
    def failing(data_iterator: Any, model: Any) -> Any:
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError

    def body() -> None:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        with a_run(config, failing) as run:
            module: Any = run.parts.model[0]
            module.module.module.dropout.eval()
            hooks = list(module.remove_forward_pre_hook_handles)
            with pytest.raises(ZeroDivisionError):
                evaluated(run)
            assert len(hooks) > 0
            assert module.remove_forward_pre_hook_handles.keys() == set(hooks)
            assert module.training
            assert module.module.module.inner.training
            assert not module.module.module.dropout.training
            assert run.parts.state.train_state.consumed_validation_samples == 0

    run_ranks(2, body, timeout=120)


def test_no_evaluation_takes_place_where_it_is_turned_off(tmp_path: Path) -> None:
    def body() -> Any:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=1))
        config.validation = ValidationConfig(eval_iters=0, eval_interval=1, eval_at_start=True)
        config.train.train_iters = 1
        return pretrain(config, token_step).validation

    assert run_ranks(1, body, timeout=120) == [{}]
    assert series(tmp_path / "run", "validation/error") == []


LAYOUTS = {
    "one rank": {},
    "data": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


def ranks_of(layout: str) -> int:
    return 1 if layout == "one rank" else 2


def token_losses_step(state: Any, data_iterator: Any, model: Any) -> Any:
    """Return the losses of the valid tokens as other data."""
    output, loss_function = gpt_forward_step(state, data_iterator, model)
    mask = loss_function.args[0]
    return output, lambda losses: None if mask is None else losses[mask > 0].tolist()


@pytest.fixture(scope="module")
def loss_of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> float:
    def body() -> Any:
        config = gpt_run(tmp_path_factory.mktemp("one") / "run", tiny_gpt())
        config.dataset = TokenData(validation=17)
        with a_run(config, gpt_forward_step) as run:
            return evaluated(run).metrics["lm loss"]

    loss: float = run_ranks(1, body, timeout=120)[0]
    return loss


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_every_layout_it_is_the_sum_of_all_token_losses_by_their_number(
    tmp_path: Path, layout: str, loss_of_one_rank: float
) -> None:
    """The set is a global batch and 5 samples more, which no layout divides evenly."""

    def body() -> Any:
        config = gpt_run(tmp_path / "run", tiny_gpt(**LAYOUTS[layout]))
        config.dataset = TokenData(validation=17)
        config.train = TrainConfig(train_iters=5, global_batch_size=12, micro_batch_size=3)
        with a_run(config, gpt_forward_step) as run:
            result = evaluated(run)
            items = run.context.collect_non_loss_data(token_losses_step)
            losses = [loss for item in items for loss in item]
            return result.metrics["lm loss"], result.tokens, result.samples, losses

    found = run_ranks(ranks_of(layout), body, timeout=120)
    samples = TokenSamples(17, 1000)
    tokens = int(sum(samples[index]["loss_mask"].sum() for index in range(17)))
    # Tensor-parallel ranks have the same tokens, all others have their own or none.
    parts = found[:1] if layout == "tensor" else found
    losses = [loss for *_, part in parts for loss in part]
    assert len(losses) == tokens
    for loss, counted, observed, _ in found:
        assert loss == pytest.approx(math.fsum(losses) / tokens, rel=1e-6)
        assert loss == pytest.approx(loss_of_one_rank, rel=2e-5)
        assert (counted, observed) == (tokens, 17)


def test_metrics_reduced_without_the_context_parallel_ranks_are_rejected(tmp_path: Path) -> None:
    def body() -> str:
        config = gpt_run(tmp_path / "run", tiny_gpt(context_parallel_size=2))
        config.dataset = TokenData(validation=8)
        with a_run(config, gpt_forward_step) as run:
            groups = run.parts.ranks.model.groups
            without = MetricReducer(
                normalization="token",
                contributes=True,
                device=torch.device("cpu"),
                group=groups.dp,
                context_parallel_size=2,
                context_parallel_group=groups.cp,
            )
            with pytest.raises(RuntimeError, match="observed") as error:
                evaluated(run, reducer=without)
        return str(error.value)

    for message in run_ranks(2, body, timeout=120):
        assert "4 samples were observed and 8 planned" in message


def predictions_step(data_iterator: Any, model: Any) -> Any:
    """Return tokens and predictions as other data; the model gets no labels."""
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], None)
    # Only the last stage collects, so the loss function of others may fail.
    return output, lambda logits: (batch["tokens"][0].tolist(), logits[0].detach())


@pytest.mark.parametrize("layout", ["pipeline", "interleaved"])
def test_the_last_stage_collects_one_item_a_microbatch_in_the_order_of_the_data(
    tmp_path: Path, layout: str
) -> None:
    """Of named sets, inside of a run, by the public function and by a callback."""

    class Collector:
        def on_step_end(self, context: Any, result: Any) -> None:
            self.found = context.collect_non_loss_data(predictions_step, "validation/b", 6)

    def body(name: str) -> Any:
        config = gpt_run(tmp_path / name, tiny_gpt(**LAYOUTS[name]), dataset=TwoTokenSets())
        config.train.train_iters = 1
        collector = Collector()
        pretrain(config, gpt_forward_step, [collector])
        config = gpt_run(tmp_path / f"{name}-public", tiny_gpt(**LAYOUTS[name]))
        config.dataset = TokenData(validation=8)
        with a_run(config, predictions_step) as run:
            public = evaluated(run, samples=8, collect_non_loss_data=True)
            assert (public.metrics, public.tokens, public.samples) == ({}, None, 8)
            assert run.parts.state.train_state.consumed_validation_samples == 0
        return [
            [(tokens, logits.tolist()) for tokens, logits in items]
            for items in (collector.found, public.non_loss_data)
        ]

    ((wanted_named, wanted_public),) = run_ranks(1, body, "one rank", timeout=120)
    first, last = run_ranks(2, body, layout, timeout=120)
    assert first == [[], []]
    for items, wanted, first_sample, number in (
        (last[0], wanted_named, 2000, 6),
        (last[1], wanted_public, 1000, 8),
    ):
        samples = TokenSamples(number, first_sample)
        data = [samples[index]["tokens"].tolist() for index in range(number)]
        assert [tokens for tokens, _ in items] == [tokens for tokens, _ in wanted] == data
        for (_, logits), (_, logits_of_one_rank) in zip(items, wanted, strict=True):
            torch.testing.assert_close(
                torch.tensor(logits), torch.tensor(logits_of_one_rank), rtol=1e-4, atol=1e-5
            )


def test_stages_of_a_pipeline_end_an_evaluation_together(tmp_path: Path) -> None:
    def body() -> Any:
        config = gpt_run(tmp_path / "run", tiny_gpt(pipeline_model_parallel_size=2))
        config.dataset = TokenData(validation=12)
        with a_run(config, gpt_forward_step) as run:
            control = run.parts.ranks.control_group
            result = evaluated(run, stop=lambda: dist.get_rank() == 0, control_group=control)
            again = evaluated(run)
            return result.samples, result.complete, result.metrics, again.samples, again.complete

    one, other = run_ranks(2, body, timeout=120)
    assert one == other
    assert one[:2] == (4, False)
    assert one[3:] == (12, True)
