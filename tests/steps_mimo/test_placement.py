"""The placement of modules on separate ranks: defaults, rejected settings, the picture."""

from typing import Any

import pytest

from bridge.cli import main
from bridge.mimo.ranks.picture import draw_placement
from bridge.mimo.ranks.placement import ModulePlacement, place_modules
from bridge.mimo.recipes import mimo_digits
from bridge.mimo.sections import ModuleParallelism
from bridge.training.config import (
    ConfigError,
    MixedPrecisionConfig,
    TrainConfig,
    configure,
    resolve,
)
from mimo_models import mimo_run, tiny_mimo


def modules(**sizes: dict[str, int]) -> dict[str, ModuleParallelism]:
    """Return the settings of an encoder and of the language model, in that order."""
    return {
        name: ModuleParallelism(
            **{
                f"{key}_size" if key != "rank_offset" else key: number
                for key, number in sizes.get(name, {}).items()
            }
        )
        for name in ("vision", "language")
    }


def offsets_and_replicas(
    world_size: int, **asked: dict[str, int]
) -> dict[str, tuple[int, int]] | list[str]:
    placements, problems = place_modules(modules(**asked), world_size)
    return problems or {
        name: (placement.offset, placement.data) for name, placement in placements.items()
    }


class TestDefaults:
    def test_one_rank_each_on_two(self) -> None:
        assert offsets_and_replicas(2) == {"vision": (0, 1), "language": (1, 1)}

    def test_open_replicas_are_as_many_as_there_are_ranks_for(self) -> None:
        assert offsets_and_replicas(6) == {"vision": (0, 3), "language": (3, 3)}
        tensor = {"tensor_model_parallel": 2}
        assert offsets_and_replicas(6, language=tensor) == {"vision": (0, 2), "language": (2, 2)}
        two = {"data_parallel": 2}
        assert offsets_and_replicas(6, vision=two) == {"vision": (0, 2), "language": (2, 4)}

    def test_an_offset_puts_a_module_before_another(self) -> None:
        asked = {"rank_offset": 1, "data_parallel": 1}
        found = offsets_and_replicas(2, vision=asked, language={"rank_offset": 0})
        assert found == {"vision": (1, 1), "language": (0, 1)}


@pytest.mark.parametrize(
    ("world_size", "asked", "says"),
    [
        (1, {}, "1 of the 1 ranks are left for vision and language, whose replicas take 2"),
        (3, {}, "3 of the 3 ranks are left for vision and language, whose replicas take 2"),
        (
            3,
            {"vision": {"data_parallel": 1}, "language": {"data_parallel": 1}},
            "no module is on rank 2 of 3",
        ),
        (
            3,
            {"language": {"rank_offset": 2, "data_parallel": 1}, "vision": {"data_parallel": 1}},
            "no module is on rank 1 of 3",
        ),
        (
            2,
            {"language": {"rank_offset": 0, "data_parallel": 2}, "vision": {"data_parallel": 1}},
            "vision and language are both on rank 0",
        ),
        (
            2,
            {"language": {"data_parallel": 2}, "vision": {"data_parallel": 1}},
            "language would be on rank 2, and there are 2 ranks; start 3",
        ),
        (
            5,
            {"language": {"data_parallel": 3}, "vision": {"data_parallel": 2}},
            "vision.data_parallel_size=2: is neither a multiple nor a divisor",
        ),
        (2, {"vision": {"data_parallel": 0}}, "vision.data_parallel_size=0: must be at least 1"),
        (2, {"vision": {"tensor_model_parallel": 0}}, "vision.tensor_model_parallel_size=0: must"),
        (2, {"language": {"rank_offset": -1}}, "language.rank_offset=-1: must be at least 0"),
    ],
)
def test_a_layout_that_does_not_fit_is_rejected(
    world_size: int, asked: dict[str, dict[str, int]], says: str
) -> None:
    _, problems = place_modules(modules(**asked), world_size)
    assert len(problems) == 1
    assert says in problems[0]


class TestPicture:
    def test_each_rank_is_a_column(self) -> None:
        placements = {
            "vision": ModulePlacement(offset=0, tensor=1, pipeline=1, data=1),
            "language": ModulePlacement(offset=1, tensor=2, pipeline=2, data=1),
        }
        assert draw_placement(placements, 4).splitlines() == [
            "rank      0         1         2         3         (4)",
            "vision    s0 r0 t0  .         .         .         .",
            "language  .         s0 r0 t0  s0 r0 t1  s1 r0 t0  s1 r0 t1",
            "(s pipeline stage, r replica, t tensor-parallel rank)",
        ]

    def test_ranks_come_in_blocks_and_many_in_words(self) -> None:
        blocks = draw_placement(
            {"language": ModulePlacement(offset=0, tensor=1, pipeline=1, data=9)}, 9
        )
        assert [line.split()[:2] for line in blocks.splitlines()[:4]] == [
            ["rank", "0"],
            ["language", "s0"],
            ["rank", "8"],
            ["language", "s0"],
        ]
        words = draw_placement(
            {"language": ModulePlacement(offset=0, tensor=8, pipeline=2, data=4)}, 64
        )
        assert words == "language  ranks 0 to 63: 8 tensor-parallel x 2 stages x 4 replicas"


class TestReport:
    def report(self, world_size: int, fields: dict[str, Any], **sections: Any) -> str:
        model = tiny_mimo(placement="separate", **fields)
        with pytest.raises(ConfigError) as caught:
            resolve(mimo_run("unused", model, **sections), device="cpu", world_size=world_size)
        return str(caught.value)

    def test_the_report_shows_the_picture_of_a_bad_layout(self) -> None:
        overlapping = modules(
            vision={"data_parallel": 1}, language={"rank_offset": 0, "data_parallel": 2}
        )
        text = self.report(2, {"parallelism": overlapping})
        assert "are both on rank" in text
        assert "\n      vision    s0 r0 t0" in text

    def test_samples_must_make_equal_parts(self) -> None:
        three = modules(vision={"data_parallel": 3}, language={"data_parallel": 1})
        text = self.report(4, {"parallelism": three})
        assert "makes 2 samples, not a multiple of the 3 replicas of a module" in text
        assert "\n      vision    s0 r0 t0  s0 r1 t0  s0 r2 t0  ." in text

    def test_layers_must_fill_the_stages(self) -> None:
        stages = modules(language={"pipeline_model_parallel": 4}, vision={"data_parallel": 1})
        text = self.report(5, {"parallelism": stages})
        assert "model.language.num_layers=2: is not a multiple of" in text
        assert "\n      language  .         s0 r0 t0  s1 r0 t0" in text

    def test_a_size_is_named_by_the_field_that_the_user_has_set(self) -> None:
        shared = modules(language={"tensor_model_parallel": 3}, vision={"data_parallel": 1})
        text = self.report(4, {"parallelism": shared})
        assert (
            "is not a multiple of model.parallelism.language.tensor_model_parallel_size=3" in text
        )
        assert "model.language.tensor_model_parallel_size" not in text
        assert "must be a multiple of tensor_model_parallel_size" not in text
        assert "\n      vision    s0 r0 t0" in text

    def test_fp16_is_rejected_as_loss_scales_would_differ_by_module(self) -> None:
        half = MixedPrecisionConfig(precision="fp16")
        text = self.report(2, {}, mixed_precision=half)
        assert "precision=fp16: is not supported with model.placement=separate" in text

    def test_a_good_layout_is_that_of_the_language_model(self) -> None:
        asked = modules(vision={"data_parallel": 4}, language={"pipeline_model_parallel": 2})
        model = tiny_mimo(placement="separate", parallelism=asked)
        train = TrainConfig(train_iters=1, global_batch_size=8, micro_batch_size=2)
        config = resolve(mimo_run("unused", model, train=train), device="cpu", world_size=8)
        layout = config.model.layout(8)  # type: ignore[attr-defined]
        assert (layout.pipeline, layout.data, layout.most_parts) == (2, 2, 4)
        assert config.model.language.variable_seq_lengths  # type: ignore[attr-defined]


def test_the_command_shows_the_picture_and_text_that_is_valid_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [
        "model.placement=separate",
        "model.parallelism.language.pipeline_model_parallel_size=2",
    ]
    assert main(["show", "mimo-digits", "--nproc", "3", *asked]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[2] == "# language  .         s0 r0 t0  s1 r0 t0"
    fed_back = configure(mimo_digits(), [], yaml_documents=[shown], device="cpu", world_size=3)
    assert fed_back.model.place_modules(3)[1] == []  # type: ignore[attr-defined]
    assert main(["show", "mimo-digits", "--nproc", "3", "model.placement=separate"]) == 2
    assert "language  .         s0 r0 t0  ." in capsys.readouterr().err
