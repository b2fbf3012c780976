"""Packed samples train like padded ones, in every stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.mimo.data.packing import pack
from bridge.training.usage_error import UsageError
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


def test_a_packed_row_has_the_tokens_of_its_samples_and_their_boundaries() -> None:
    samples = [sample(1, 3), sample(0, 4, seed=1)]
    row = microbatch(*samples, pack=True)
    padded = microbatch(*samples)
    # The samples have 7 and 4 tokens, the last of which is a label alone. One token of padding
    # makes the length even.
    lengths = [6, 3, 1]
    assert row["packing_kwargs"]["cu_seqlens_q"].tolist() == [0, 6, 9, 10]
    assert row["packing_kwargs"]["max_seqlen_q"] == 6
    for key in ("input_ids", "labels", "loss_mask", "position_ids"):
        parts = row[key][0].split(lengths)
        for number, length in enumerate(lengths[:2]):
            assert torch.equal(parts[number], padded[key][number, :length])
    assert row["loss_mask"].sum() == padded["loss_mask"].sum()
    assert row["loss_mask"][0, -1] == 0


def changed(**values: Any) -> dict[str, Any]:
    """Return a sample of 2 images and 3 tokens, with some values replaced."""
    return sample(2, 3) | values


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("mistaken", "message"),
    [
        (changed(labels=torch.zeros(5, dtype=torch.int64)), r"input_ids \[12\], labels \[5\]"),
        (changed(loss_mask=torch.ones(13)), r"loss_mask \[13\]"),
        (changed(position_ids=torch.arange(12)[None]), r"position_ids \[1, 12\]"),
        ({k: v for k, v in changed().items() if k != "labels"}, "has no labels; give input_ids"),
        (changed(length=13), "length=13 of 12 tokens; give the number"),
        (changed(length=0), "length=0 of 12 tokens"),
        (
            changed(items={"vision": {"pixels": torch.ones(2, 3, 8, 8), "grid": torch.ones(3)}}),
            "with 2 of pixels, 3 of grid",
        ),
        (
            changed(items={"vision": {"grid": torch.ones(2)}}),
            "with other arguments, pixels and grid",
        ),
    ],
)
def test_a_sample_with_tensors_of_different_lengths_is_rejected(
    mistaken: dict[str, Any], message: str, packed: bool
) -> None:
    with pytest.raises(UsageError, match=message):
        microbatch(sample(1, 3), mistaken, pack=packed)


def test_special_tokens_in_the_padding_of_a_packed_sample_are_not_counted() -> None:
    mistaken = changed(length=4)
    with pytest.raises(UsageError, match="sample 0 .* has 2 items of 'vision', and . tokens"):
        microbatch(mistaken, pack=True)
    with pytest.raises(UsageError, match="0 samples and multiple_of=1"):
        pack([])


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
