"""The part of the answers that are right, counted on logits, wherever the language model is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from bridge.mimo.accuracy import AnswerAccuracy
from bridge.training.mimo_step import forward_step
from bridge.training.pretrain import pretrain
from mimo_layout_runs import ALONE, MIXED, Chosen, MimoLayout, Sizes, run_in_layout
from mimo_models import microbatch, sample
from ranks import run_ranks
from training_runs import a_run


def by_hand(place: Path) -> tuple[float, float]:
    """Return the accuracy of the untrained model and its loss, from its logits."""
    with a_run(config(place, ALONE), forward_step) as run:
        run.model[0].eval()
        right, asked, loss = 0, 0, 0.0
        for number, images in enumerate(MIXED):
            one = microbatch(sample(images, 4 + (number % 4) * (images == 0), seed=number))
            inputs = {key: value for key, value in one.items() if key != "item_counts"}
            with torch.no_grad():
                logits, _ = run.model[0](**(inputs | {"labels": None}))
            counts = one["loss_mask"] != 0
            right += int(((logits.argmax(-1) == one["labels"]) & counts).sum())
            asked += int(counts.sum())
            losses = functional.cross_entropy(
                logits[counts], one["labels"][counts], reduction="sum"
            )
            loss += float(losses)
    return right / asked, loss / asked


def config(place: Path, layout: MimoLayout) -> Any:
    made = run_in_layout(place, layout)
    made.dataset = Chosen(MIXED, validation=16)
    made.train.train_iters = 1
    # It stays as it is.
    made.optimizer.lr = made.optimizer.min_lr = 0.0
    made.optimizer.weight_decay = 0.0
    return made


@pytest.mark.parametrize(
    "layout",
    [
        ALONE,
        MimoLayout(vision=Sizes(data=2), language=Sizes(pipeline=2)),
        MimoLayout(vision=Sizes(), language=Sizes(tensor=2)),
    ],
    ids=lambda layout: layout.name,
)
def test_it_is_the_part_of_right_answers_beside_the_loss(
    layout: MimoLayout, tmp_path: Path
) -> None:
    def body() -> Any:
        return pretrain(config(tmp_path / "run", layout), forward_step, [AnswerAccuracy()])

    [(expected, loss)] = run_ranks(1, by_hand, tmp_path / "by hand", timeout=60)
    assert expected > 0
    for result in run_ranks(layout.ranks, body, timeout=90):
        assert result.validation["accuracy"] == pytest.approx(expected)
        assert result.validation["lm loss"] == pytest.approx(loss, rel=1e-5)
