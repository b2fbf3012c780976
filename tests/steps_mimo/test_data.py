"""Samples, their microbatches, and the datasets: handwritten digits and mock data."""

from typing import Any

import pytest
import torch

from bridge.mimo.data.digits import HELD_OUT, IMAGE, QUESTION, DigitsDatasetConfig, load_digits
from bridge.mimo.data.microbatches import Collate, count_items
from bridge.mimo.data.mock import MockDatasetConfig
from bridge.mimo.data.samples import make_next_token_sample
from bridge.mimo.recipes import mimo_digits
from bridge.training.config import ConfigContainer, ConfigError, resolve
from bridge.training.contracts import DataRequest, DataSplits
from mimo_models import IMAGE as TINY_IMAGE
from mimo_models import PER_IMAGE, microbatch, mimo_run, sample, tiny_mimo


def built(config: ConfigContainer, modules: frozenset[str] | None = None) -> DataSplits:
    request = DataRequest(
        config=config,
        train_samples=8,
        validation_samples=8,
        test_samples=8,
        modules=modules,
    )
    splits = config.dataset.build(request)
    assert isinstance(splits, DataSplits)
    return splits


class TestSamples:
    def test_a_label_is_the_next_token_where_it_counts(self) -> None:
        made = make_next_token_sample([5, 6, 7], counted=[2], seq_length=4, padding=9)
        assert made["input_ids"].tolist() == [5, 6, 9, 9]
        assert made["labels"].tolist() == [0, 7, 0, 0]
        assert made["loss_mask"].tolist() == [0.0, 1.0, 0.0, 0.0]
        assert made["length"] == 2

    @pytest.mark.parametrize(
        ("tokens", "counted", "says"),
        [([1] * 6, [1], "a sample has 6 tokens"), ([1, 2], [0], "must be positions from 1 to 1")],
    )
    def test_a_text_that_cannot_be_predicted_is_rejected(
        self, tokens: list[int], counted: list[int], says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            make_next_token_sample(tokens, counted=counted, seq_length=4, padding=0)

    def test_a_microbatch_has_the_items_of_all_samples_in_their_order(self) -> None:
        samples = [sample(2, 3), sample(0, 4), sample(1, 3, seed=5)]
        made = microbatch(*samples)
        pixels = made["modality_inputs"]["vision"]["encoder"]["pixels"]
        parts = [one["items"]["vision"]["pixels"] for one in samples]
        assert torch.equal(pixels, torch.cat(parts))
        assert made["item_counts"]["vision"].tolist() == [2, 0, 1]
        assert count_items(made) == 3
        assert microbatch(sample(0, 4))["modality_inputs"] == {}

    def test_tokens_and_items_must_match(self) -> None:
        wrong = sample(1, 4)
        wrong["items"]["vision"]["pixels"] = torch.zeros(2, 1, 4, 4)
        with pytest.raises(ValueError, match="sample 0 of a microbatch has 2 items of 'vision'"):
            microbatch(wrong)
        collate = Collate(special_token_ids={"audio": -1}, tokens_per_item={"audio": 1})
        with pytest.raises(ValueError, match="has items of 'vision', and the model has encoders"):
            collate([sample(1, 4)])


class TestDigits:
    def test_every_fifth_image_is_held_out_and_the_answer_is_the_digit(self) -> None:
        images, digits = load_digits()
        splits = built(mimo_digits())
        held_out: Any = splits.validation
        assert len(held_out) == 360
        first = held_out[1]
        assert torch.equal(first["items"]["vision"]["pixels"][0], images[HELD_OUT][1])
        assert first["input_ids"].tolist() == [IMAGE] * 4 + [QUESTION]
        assert first["labels"][first["loss_mask"] != 0].tolist() == [int(digits[HELD_OUT][1])]

    def test_a_view_is_another_image_of_its_digit_and_the_same_every_time(self) -> None:
        train: Any = built(mimo_digits()).train
        number = len(train) // 32
        assert len(train) == 1437 * 32
        plain, view, again = train[3], train[3 + number], train[3 + number]
        pixels = [made["items"]["vision"]["pixels"] for made in (plain, view, again)]
        assert torch.equal(plain["labels"], view["labels"])
        assert torch.equal(pixels[1], pixels[2])
        assert not torch.equal(pixels[0], pixels[1])

    def test_digits_that_the_model_cannot_read_are_rejected(self) -> None:
        config = mimo_digits()
        config.model.encoders["vision"].num_channels = 3  # type: ignore[attr-defined]
        config.model.language.vocab_size = 12  # type: ignore[attr-defined]
        config.dataset = DigitsDatasetConfig()
        with pytest.raises(ConfigError) as caught:
            resolve(config, device="cpu", world_size=1)
        assert "num_channels=3: that of the digits is 1" in str(caught.value)
        assert "vocab_size=12: is less than the digits' 13" in str(caught.value)


class TestMock:
    def test_samples_are_a_function_of_their_index(self) -> None:
        config = mimo_run("unused", tiny_mimo())
        first: Any = built(config).train
        second: Any = built(config).train
        counts = [int((first[i]["input_ids"] == TINY_IMAGE).sum()) // PER_IMAGE for i in range(20)]
        assert set(counts) == {0, 1, 2}
        for key in ("input_ids", "labels"):
            assert torch.equal(first[7][key], second[7][key])

    def test_a_rank_without_the_encoder_loads_the_same_text_and_no_image(self) -> None:
        config = mimo_run("unused", tiny_mimo())
        both, text = (built(config, modules).train for modules in (None, frozenset({"language"})))
        assert both is not None
        assert text is not None
        for index in range(4):
            assert torch.equal(both[index]["input_ids"], text[index]["input_ids"])
            number = len(both[index]["items"]["vision"]["pixels"])
            assert text[index]["items"]["vision"]["nothing"].shape == (number, 0)
        assert count_items(microbatch(text[0], text[1])) == count_items(
            microbatch(both[0], both[1])
        )

    def test_images_must_leave_room_for_text(self) -> None:
        config = mimo_run("unused", tiny_mimo(), dataset=MockDatasetConfig(max_images=3))
        with pytest.raises(ConfigError, match="leave no room for text"):
            resolve(config, device="cpu", world_size=1)
