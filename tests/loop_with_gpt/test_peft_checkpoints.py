"""Checkpoints of adapters hold no base model, resume exactly, and reject another base model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing import load_tensors_metadata

from bridge.peft import DoRA, LoRA
from bridge.training.checkpoint.base import fingerprint
from bridge.training.config import ConfigContainer
from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from peft_runs import PP, SP, adapted_run, train_adapters, train_bases
from ranks import run_ranks
from training_runs import series

pytestmark = pytest.mark.xdist_group("adapters saved")

METHOD = LoRA(dim=4, dropout=0.1, target_modules=["*.layers.1.*", "linear_proj"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_bases(tmp_path_factory.mktemp("bases"))


def saving_run(directory: Path, base: Path, kind: str = "dense", **options: Any) -> ConfigContainer:
    config = adapted_run(directory, base, kind, **options)
    config.checkpoint.save_interval = 2
    # Several buckets in each gradient buffer, with padding.
    config.ddp.bucket_size = 100
    return config


def interrupted(config: ConfigContainer) -> None:
    """Train the first two steps of a run that is stopped then."""

    class Stop:
        def on_step_end(self, context: Any, result: Any) -> None:
            if context.state.train_state.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(config, forward_step, [Stop()])


def resumed(config: ConfigContainer, **layout: Any) -> list[Any]:
    config = config.copy()
    config.checkpoint.resume = True
    for name, value in layout.items():
        setattr(config.model, name, value)
    pretrain(config, forward_step)
    return series(str(config.checkpoint.run_dir), "lm loss")


def test_a_resumed_run_continues_bit_for_bit_and_holds_nothing_of_the_base(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    def both() -> tuple[list[Any], list[Any], list[str], str]:
        whole = train_adapters(saving_run(tmp_path / "whole", bases["dense"], method=METHOD))[
            "lm loss"
        ]
        config = saving_run(tmp_path / "cut", bases["dense"], method=METHOD)
        interrupted(config)
        checkpoint = tmp_path / "cut/checkpoints/step-0000002"
        saved = [name for name in load_tensors_metadata(str(checkpoint)) if "optim" not in name]
        text = (tmp_path / "cut/config.yaml").read_text()
        return whole, resumed(config), saved, text

    [(whole, again, saved, text)] = run_ranks(1, both)
    assert again == whole
    assert saved
    assert all(".adapter." in name for name in saved)
    # The exact checkpoint, not the run, which may go on.
    assert ConfigContainer.from_yaml(text).checkpoint.pretrained_checkpoint == str(
        bases["dense"] / "checkpoints/step-0000001"
    )


@pytest.mark.parametrize(
    ("kind", "method", "layouts"),
    [
        ("dense", DoRA(dim=4, target_modules=["*.layers.1.*"]), (SP, PP)),
        ("experts", LoRA(dim=4, exclude_modules=["*.local_experts.3.*"]), (SP, PP)),
    ],
    ids=["dense", "experts"],
)
def test_another_layout_can_resume(
    kind: str, method: Any, layouts: tuple[Any, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    before, after = layouts
    plain = {name: 1 for name in before} | {"sequence_parallel": False}
    config = saving_run(tmp_path / "run", bases[kind], kind, method=method, **before)
    run_ranks(2, interrupted, config)
    found = run_ranks(2, lambda: resumed(config, **(plain | after)))[0]
    whole = run_ranks(
        1, lambda: train_adapters(adapted_run(tmp_path / "whole", bases[kind], kind, method=method))
    )[0]
    assert found == pytest.approx(whole["lm loss"], rel=1e-5)


def test_a_base_model_that_was_moved_is_accepted_and_another_one_is_rejected(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    config = saving_run(tmp_path / "run", bases["dense"], method=METHOD)
    moved = shutil.copytree(bases["dense"], tmp_path / "moved")

    def attempts() -> tuple[str, str, list[Any]]:
        interrupted(config)
        config.checkpoint.pretrained_checkpoint = str(bases["other"])
        with pytest.raises(ValueError, match="pretrained_checkpoint") as other:
            resumed(config)
        # Its weights do not even fit; the message says first that they are different.
        config.checkpoint.pretrained_checkpoint = str(bases["experts"])
        with pytest.raises(ValueError, match="has other weights than"):
            resumed(config)
        config.checkpoint.pretrained_checkpoint = str(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="pretrained_checkpoint") as nowhere:
            resumed(config)
        config.checkpoint.pretrained_checkpoint = str(moved)
        return str(other.value), str(nowhere.value), resumed(config)

    [(other, nowhere, losses)] = run_ranks(1, attempts)
    assert "has other weights than" in other
    assert "does not exist" in nowhere
    assert len(losses) == 3


def test_what_the_checkpoint_holds_is_not_taken_for_something_else(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    config = saving_run(tmp_path / "run", bases["dense"], method=METHOD)

    def attempts() -> list[str]:
        interrupted(config)
        plain = config.copy()
        plain.peft = None
        found = []
        with pytest.raises(ValueError, match="peft") as error:
            resumed(plain)
        found.append(str(error.value))
        for of_adapters in (None, METHOD):
            start = saving_run(tmp_path / "start", tmp_path / "run", method=METHOD)
            start.peft = of_adapters
            with pytest.raises(ValueError, match="bridge merge") as error:
                pretrain(start, forward_step)
            found.append(str(error.value))
        return found

    [lines] = run_ranks(1, attempts)
    assert "the run trained adapters, and the present configuration trains the model" in lines[0]
    assert all("holds adapters and not the model" in line for line in lines[1:])


def test_the_fingerprint_tells_weights_apart_wherever_they_lie(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    dense, other = (bases[kind] / "checkpoints/step-0000001" for kind in ("dense", "other"))
    copy = shutil.copytree(dense, tmp_path / "copy")
    # Of an evaluation at the end of the run, and of one whose process was killed.
    (copy / "evaluations.json").write_text("{}")
    (copy / "evaluations.json.tmp").write_text("{")
    assert fingerprint(copy) == fingerprint(dense) != fingerprint(other)
    large = tmp_path / "large"
    large.mkdir()
    (large / "weights.distcp").write_bytes(b"a" * 3_000_000)
    before = fingerprint(large)
    (large / "weights.distcp").write_bytes(b"a" * 2_999_999 + b"b")
    assert fingerprint(large) != before


def test_without_a_base_it_says_that_the_weights_are_random(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = adapted_run(tmp_path / "run", None)

    def attempts() -> None:
        train_adapters(config)
        changing = adapted_run(tmp_path / "changing", None)
        changing.rng.layout_invariant_init = False
        with pytest.raises(ValueError, match="adapters need base weights"):
            train_adapters(changing)

    run_ranks(1, attempts)
    written = capfd.readouterr().out
    assert (
        "lora adapts 8 layers: 2 linear_fc1, 2 linear_fc2, 2 linear_proj, 2 linear_qkv" in written
    )
    assert "on top of initial weights of rng.seed=7" in written
    assert "warning: the adapters are on top of random weights" in written
    # 2 layers; rank 4 for weights of 32x64, 32x32, 32x96, 48x32.
    trains = 2 * 4 * ((32 + 64) + (32 + 32) + (32 + 96) + (48 + 32))
    assert f"lora trains {trains:,} of " in written
