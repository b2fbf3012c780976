"""Packed samples train as those that are padded, whatever the stage they are in."""

from pathlib import Path

import pytest
import torch

from mimo_layout_runs import (
    ALONE,
    MIXED,
    Chosen,
    MimoLayout,
    Sizes,
    Steps,
    deviations,
    run_in_layout,
    train_steps,
)
from mimo_models import microbatch, sample
from ranks import run_ranks


def test_a_packed_row_has_the_tokens_of_its_samples_and_says_where_they_end() -> None:
    samples = [sample(1, 3), sample(0, 4, seed=1)]
    row = microbatch(*samples, pack=True)
    padded = microbatch(*samples)
    # Of 7 and 4 tokens the last of each is a label alone; one more makes the length even.
    lengths = [6, 3, 1]
    assert row["packing_kwargs"]["cu_seqlens_q"].tolist() == [0, 6, 9, 10]
    assert row["packing_kwargs"]["max_seqlen_q"] == 6
    for key in ("input_ids", "labels", "loss_mask", "position_ids"):
        parts = row[key][0].split(lengths)
        for number, length in enumerate(lengths[:2]):
            assert torch.equal(parts[number], padded[key][number, :length])
    assert row["loss_mask"].sum() == padded["loss_mask"].sum()
    assert row["loss_mask"][0, -1] == 0


@pytest.mark.parametrize(
    ("layout", "parallel"),
    [
        (ALONE, False),
        (MimoLayout(vision=Sizes(), language=Sizes(data=2, pipeline=2)), False),
        (MimoLayout(vision=Sizes(), language=Sizes(tensor=2)), True),
    ],
    ids=lambda value: value.name if isinstance(value, MimoLayout) else "",
)
def test_packed_samples_have_the_losses_and_gradients_of_padded_ones(
    layout: MimoLayout, parallel: bool, tmp_path: Path
) -> None:
    def body(name: str, layout: MimoLayout, pack: bool, parallel: bool) -> Steps:
        config = run_in_layout(tmp_path / name, layout, language={"sequence_parallel": parallel})
        config.dataset = Chosen(MIXED, pack=pack)
        return train_steps(config, steps=2)

    (padded,) = run_ranks(1, body, "padded", ALONE, False, False, timeout=120)
    packed = run_ranks(layout.ranks, body, "packed", layout, True, parallel, timeout=120)[0]
    found = deviations(packed, padded)
    assert found.loss < 1e-6
    assert found.grad_norm < 1e-5
    assert max(found.encoder, found.language) < 5e-6
