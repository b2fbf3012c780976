"""The accuracy of answers, counted on logits, under every placement of the language model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from bridge.mimo.accuracy import AnswerAccuracy, count_step
from bridge.training.mimo_step import forward_step
from bridge.training.pretrain import pretrain
from bridge.training.usage_error import UsageError
from mimo_layout_runs import ALONE, MIXED, Chosen, MimoLayout, Sizes, run_in_layout
from mimo_models import microbatch, sample
from ranks import run_ranks
from training_runs import a_run
from validation_sets import evaluated

IMAGES = MIXED + MIXED[:7]
"""Numbers of images in a global batch of 16 samples, and in 7 more samples."""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, int, float]]:
    """Return right answers, answers and loss of each sample, by the untrained model's logits."""

    def body() -> list[tuple[int, int, float]]:
        found = []
        directory = tmp_path_factory.mktemp("by hand")
        with a_run(config(directory / "run", ALONE), forward_step) as run, torch.no_grad():
            run.parts.model[0].eval()
            for number, images in enumerate(IMAGES):
                one = microbatch(sample(images, 4 + (number % 4) * (images == 0), seed=number))
                inputs = {key: value for key, value in one.items() if key != "item_counts"}
                logits, _ = run.parts.model[0](**(inputs | {"labels": None}))
                counts = one["loss_mask"] != 0
                right = int(((logits.argmax(-1) == one["labels"]) & counts).sum())
                losses = functional.cross_entropy(
                    logits[counts], one["labels"][counts], reduction="sum"
                )
                found.append((right, int(counts.sum()), float(losses)))
        return found

    [found] = run_ranks(1, body, timeout=60)
    return found


def config(directory: Path, layout: MimoLayout, samples: int = 0) -> Any:
    made = run_in_layout(directory, layout)
    made.dataset = Chosen(IMAGES, validation=samples)
    made.train.train_iters = 1
    # At a learning rate of zero the weights do not change.
    made.optimizer.lr = made.optimizer.min_lr = 0.0
    made.optimizer.weight_decay = 0.0
    return made


@pytest.mark.parametrize(
    ("layout", "samples"),
    [
        (ALONE, 23),
        (MimoLayout(language=Sizes(data=2)), 23),
        (MimoLayout(vision=Sizes(data=2), language=Sizes(pipeline=2)), 22),
        (MimoLayout(vision=Sizes(), language=Sizes(tensor=2)), 23),
    ],
    ids=lambda value: value.name if isinstance(value, MimoLayout) else "",
)
def test_accuracy_is_the_fraction_of_right_answers_next_to_the_loss(
    layout: MimoLayout,
    samples: int,
    by_hand: list[tuple[int, int, float]],
    tmp_path: Path,
) -> None:
    def body() -> Any:
        made = config(tmp_path / "run", layout, samples)
        return pretrain(made, forward_step, [AnswerAccuracy()])

    right, answers, loss = (sum(numbers) for numbers in zip(*by_hand[:samples], strict=True))
    assert right > 0
    for result in run_ranks(layout.ranks, body, timeout=90):
        assert result.validation["accuracy"] == pytest.approx(right / answers)
        assert result.validation["lm loss"] == pytest.approx(loss / answers, rel=1e-5)


def test_an_odd_sample_of_two_encoders_counts_once_in_the_loss_and_cannot_be_collected(
    by_hand: list[tuple[int, int, float]], tmp_path: Path
) -> None:
    """Each microbatch of the language model is divided between the two."""

    def body() -> Any:
        layout = MimoLayout(vision=Sizes(data=2), language=Sizes())
        made = config(tmp_path / "run", layout, 23)
        with a_run(made, forward_step) as run:
            result = evaluated(run)
            with pytest.raises(UsageError, match="collect from 22 samples"):
                run.context.collect_non_loss_data(count_step)
            with pytest.raises(UsageError, match="validation data: 23 samples"):
                AnswerAccuracy().on_train_start(run.context)
        return result.metrics["lm loss"], result.tokens, result.samples

    _, answers, loss = (sum(numbers) for numbers in zip(*by_hand, strict=True))
    for found, tokens, samples in run_ranks(3, body, timeout=90):
        assert found == pytest.approx(loss / answers, rel=1e-5)
        assert (tokens, samples) == (answers, 23)
