"""Auxiliary losses: z-loss, load balancing and MTP layers, the same under every layout."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, override

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from auxiliary_loss_definitions import (
    EXPERTS,
    LAYOUTS,
    MATRIX_LAYOUTS,
    Found,
    Objective,
    matrix,
    step_by_definition,
    step_of_ours,
)
from bridge.training.gpt_step import forward_step
from bridge.training.megatron_patches import own_loss_trackers
from bridge.training.pretrain import pretrain
from bridge.training.state import GlobalState
from campaigns import hand_back, options_of
from gpt_models import VOCABULARY, build_chunks, run_of, tiny_gpt
from ranks import run_ranks
from training_runs import TokenData, Weights, a_run, gpt_run, one_step, rows

ALL = Objective(z=0.5, sequence=1.0, ahead=2, padded=True, micro_batch_size=2)
PRECISE = 2e-6
ASKED = options_of("auxiliary_losses")
"""The options of tools/auxiliary_losses.py; None in the suite."""


@pytest.fixture(scope="module")
def wanted() -> Callable[[Objective], Found]:
    """Return the step of an objective by its definition, computed on first use."""

    @cache
    def of(objective: Objective) -> Found:
        return run_ranks(1, step_by_definition, objective)[0]

    return of


def check(found: list[Found], reference: Found, precision: float = PRECISE) -> None:
    for of_rank in found:
        assert of_rank.metrics == found[0].metrics
        assert of_rank.metrics == pytest.approx(reference.metrics, rel=precision)
        assert of_rank.grad_norm == pytest.approx(reference.grad_norm, rel=precision)
        assert of_rank.deviation(reference) < precision


def cases() -> list[tuple[str, Objective, str]]:
    """Return names, objectives and layouts."""
    if ASKED is None:
        return [(layout, ALL, layout) for layout in LAYOUTS if layout != "alone"]
    return [
        (name, objective, layout)
        for name, objective, layout in matrix()
        if all(phrase in " ".join(name.split()) for phrase in ASKED["only"])
    ]


@pytest.mark.parametrize(
    ("name", "objective", "layout"), cases(), ids=[" ".join(name.split()) for name, _, _ in cases()]
)
def test_every_layout_finds_what_the_definitions_say(
    wanted: Callable[[Objective], Found], name: str, objective: Objective, layout: str
) -> None:
    ranks, sizes = MATRIX_LAYOUTS[layout]
    timeout = 60 if ASKED is None else ASKED["timeout"]
    found = run_ranks(ranks, lambda: step_of_ours(objective, **sizes), timeout=timeout)
    reference = wanted(objective)
    assert found[0].metrics.keys() == reference.metrics.keys()
    hand_back(name=name, deviations=[of_rank.deviations(reference) for of_rank in found])
    check(found, reference, PRECISE if ASKED is None else 1e-5)


@pytest.mark.parametrize("pattern", [1, 2])
def test_the_number_of_microbatches_changes_nothing(
    wanted: Callable[[Objective], Found], pattern: Any
) -> None:
    objective = replace(ALL, pattern=pattern)

    def body() -> list[Found]:
        return [step_of_ours(replace(objective, micro_batch_size=size)) for size in (1, 4)]

    (found,) = run_ranks(1, body)
    for of_size in found:
        check([of_size], wanted(objective))


@pytest.mark.parametrize("layout", ["tensor", "context"])
def test_microbatch_normalization_averages_the_microbatches_means(
    wanted: Callable[[Objective], Found], layout: str
) -> None:
    objective = replace(ALL, batch=0.7, normalization="microbatch")
    ranks, sizes = LAYOUTS[layout]
    check(run_ranks(ranks, lambda: step_of_ours(objective, **sizes)), wanted(objective))


def test_the_batch_level_balance_loss_belongs_to_a_micro_batch_size(
    wanted: Callable[[Objective], Found],
) -> None:
    objective = Objective(batch=1.0, micro_batch_size=2)
    check(run_ranks(2, lambda: step_of_ours(objective, context_parallel_size=2)), wanted(objective))
    other = wanted(replace(objective, micro_batch_size=1))
    assert wanted(objective).deviation(other) > 100 * PRECISE


def test_without_a_counted_token_the_gradients_are_zero() -> None:
    objective = replace(ALL, counted="none")
    (found,) = run_ranks(1, lambda: step_of_ours(objective))
    assert found.metrics["lm loss"] is None
    assert found.metrics["mtp_1 loss"] is None
    assert (found.metrics["z_loss"] or 0.0) > 0
    assert all(not gradient.any() for gradient in found.gradients.values())


def test_microbatches_of_padding_alone_take_no_part() -> None:
    class Filled(Objective):
        """An objective whose every second microbatch is padding."""

        @override
        def microbatch(self, number: int) -> dict[str, torch.Tensor]:
            batch = super().microbatch(number // 2)
            if number % 2:
                batch["padding_mask"].fill_(True)
                batch["loss_mask"].zero_()
            return batch

    def body() -> tuple[Found, Found]:
        values: dict[str, Any] = {"z": 0.5, "sequence": 1.0, "batch": 0.7, "padded": True}
        filled = step_of_ours(Filled(**values, global_batch_size=8))
        return filled, step_of_ours(Objective(**values, global_batch_size=4))

    ((filled, real),) = run_ranks(1, body)
    check([filled], real)


def test_the_bias_that_balances_experts_counts_real_tokens() -> None:
    objective = Objective(padded=True, micro_batch_size=4)

    def body() -> tuple[list[int], int]:
        model = tiny_gpt(
            num_moe_experts=EXPERTS,
            moe_router_topk=2,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="none",
        )
        (chunk,) = build_chunks(model)
        batch = objective.microbatch(0)
        forward_step(GlobalState(run_of(model)), iter([batch]), chunk)
        routers = [layer.mlp.router for layer in chunk.decoder.layers]
        counts = [int(router.local_tokens_per_expert.sum()) for router in routers]
        return counts, int((~batch["padding_mask"]).sum())

    ((counts, real),) = run_ranks(1, body)
    assert counts == [2 * real] * 4


def test_a_logged_step_has_the_mean_of_its_interval_or_its_own_values(tmp_path: Path) -> None:
    def run(folder: str, interval: int, average: Any) -> None:
        model = ALL.model()
        # The losses of an evaluation are in no training row.
        validation = 4 if folder == "mean" else 0
        config = gpt_run(tmp_path / folder, model, dataset=TokenData(validation=validation))
        config.train.train_iters, config.validation.eval_interval = 4, 2
        config.logger.log_interval, config.logger.average = interval, average
        pretrain(config, forward_step)

    def body() -> None:
        run("each", 1, "interval")
        run("mean", 3, "interval")
        run("own", 3, "step")

    run_ranks(1, body)
    names = ["lm loss", "z_loss", "seq_load_balancing_loss", "mtp_1 loss", "mtp_2 loss"]
    each, mean, own = (
        {
            row["step"]: {name: row[name] for name in names}
            for row in rows(tmp_path / folder)
            if "lm loss" in row
        }
        for folder in ("each", "mean", "own")
    )
    assert own == {step: each[step] for step in (3, 4)}
    first = {name: sum(each[step][name] for step in (1, 2, 3)) / 3 for name in names}
    assert mean == {3: pytest.approx(first, rel=1e-12), 4: each[4]}
    for values in each.values():
        assert values["seq_load_balancing_loss"] == pytest.approx(1.0, rel=0.3)
        assert values["mtp_2 loss"] == pytest.approx(math.log(VOCABULARY), rel=0.3)
    assert len({values["z_loss"] for values in each.values()}) == 4


def test_a_model_without_auxiliary_losses_logs_none(tmp_path: Path) -> None:
    def body() -> set[str]:
        with a_run(gpt_run(tmp_path / "run", tiny_gpt()), forward_step) as run:
            return set(one_step(run, reducer=run.parts.reducer).metrics)

    assert run_ranks(1, body) == [{"lm loss"}]


def test_trackers_of_the_host_program_are_as_they_were() -> None:
    def body() -> None:
        get_moe_metrics_tracker().record("z_loss", torch.tensor(3.0), 1, 2)
        MTPLossLoggingHelper.tracker["loss_values"] = torch.ones(1)
        before = get_moe_metrics_tracker(), MTPLossLoggingHelper.tracker
        with contextlib.suppress(ZeroDivisionError), own_loss_trackers():
            assert not get_moe_metrics_tracker().metrics
            assert not MTPLossLoggingHelper.tracker
            raise ZeroDivisionError
        assert (get_moe_metrics_tracker(), MTPLossLoggingHelper.tracker) == before
        assert get_moe_metrics_tracker().metrics["z_loss"].values.tolist() == [3.0, 0.0]

    run_ranks(1, body)


def test_a_pipeline_with_tied_embeddings_and_later_tokens_is_saved_and_continued(
    tmp_path: Path,
) -> None:
    def body(steps: int, stages: int) -> dict[str, torch.Tensor]:
        model = tiny_gpt(
            mtp_num_layers=1,
            share_embeddings_and_output_weights=True,
            pipeline_model_parallel_size=stages,
        )
        config = gpt_run(tmp_path / "run", model)
        config.train.train_iters = steps
        config.scheduler.lr_decay_style, config.scheduler.lr_warmup_fraction = "constant", 0.0
        config.checkpoint.save_at_end, config.checkpoint.resume = True, steps > 2
        weights = Weights()
        pretrain(config, forward_step, [weights])
        return weights.parameters

    first, last = run_ranks(2, body, 2, 2)
    assert not [name for name in last if name.startswith("output_layer")]
    name = "embedding.word_embeddings.weight"
    torch.testing.assert_close(first[name], last[name], rtol=0, atol=0)
    run_ranks(1, body, 4, 1)
    steps = [row["step"] for row in rows(tmp_path / "run") if "lm loss" in row]
    assert steps == [1, 2, 3, 4]
