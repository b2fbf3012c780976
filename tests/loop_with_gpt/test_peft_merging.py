"""Adapters are merged into their base model, and exported to Hugging Face's peft."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.cli import main
from bridge.peft import CanonicalLoRA, DoRA, LoRA
from bridge.training.config import ConfigContainer
from bridge.training.gpt_step import forward_step
from gpt_models import microbatch
from hf_models import VOCABULARY
from peft_runs import SP, adapted_run, base_run, train_adapters, train_bases
from ranks import run_ranks
from training_runs import a_run

pytestmark = pytest.mark.xdist_group("transformers")

METHODS: dict[str, Any] = {
    "lora": LoRA(dim=4, alpha=10.0),
    "dora": DoRA(dim=4),
    "canonical": CanonicalLoRA(
        dim=4,
        target_modules=["linear_q", "linear_v", "linear_fc1_up", "*.layers.1.*.linear_proj"],
    ),
}


def logits(config: ConfigContainer) -> torch.Tensor:
    """Return the logits of a run's model for some tokens, before its first step here."""
    batch = microbatch(3)
    with a_run(config, forward_step) as run, torch.no_grad():
        run.parts.model[0].eval()
        output: torch.Tensor = run.parts.model[0](batch["tokens"], batch["position_ids"], None)
        return output[..., :VOCABULARY].clone()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of each method, trained on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("runs")
    bases = train_bases(folder)

    def train_all() -> None:
        for name, method in METHODS.items():
            config = adapted_run(folder / name, bases["dense"], method=method, **SP)
            config.checkpoint.save_at_end = True
            train_adapters(config)

    run_ranks(2, train_all)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_the_merged_model_gives_the_logits_of_the_adapted_one(
    name: str, runs: Path, tmp_path: Path
) -> None:
    def compare() -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        code = main(["merge", str(runs / name), "--output", str(tmp_path / "merged")])
        adapted = adapted_run(runs / name, runs / "dense", method=METHODS[name])
        adapted.checkpoint.resume = True
        merged = base_run(tmp_path / "run")
        merged.checkpoint.pretrained_checkpoint = str(tmp_path / "merged")
        base = base_run(tmp_path / "base")
        base.checkpoint.pretrained_checkpoint = str(runs / "dense")
        return code, logits(adapted), logits(merged), logits(base)

    [(code, adapted, merged, base)] = run_ranks(1, compare, process_group=False)
    assert code == 0
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - base).abs().max() > 1e-2


# peft asks transformers under the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", METHODS)
def test_hugging_faces_peft_gives_equal_logits(name: str, runs: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    def export() -> tuple[list[int], torch.Tensor]:
        codes = [
            main(["export", str(runs / "dense"), "--to", "hf", "--output", str(tmp_path / "hf")]),
            main(["export", str(runs / name), "--to", "hf-peft", "--output", str(tmp_path / "ad")]),
        ]
        adapted = adapted_run(runs / name, runs / "dense", method=METHODS[name])
        adapted.checkpoint.resume = True
        return codes, logits(adapted)

    [(codes, wanted)] = run_ranks(1, export, process_group=False)
    assert codes == [0, 0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "ad").eval()
    with torch.no_grad():
        found = adapted(microbatch(3)["tokens"]).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (adapted.peft_config["default"].peft_type, len(adapted.active_adapters)) == ("LORA", 1)


def test_a_run_that_cannot_be_merged_is_rejected(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def attempts() -> list[int]:
        output = ["--output", str(tmp_path / "merged")]
        return [
            main(["merge", str(runs / "dense"), *output]),
            main(["merge", str(runs / "lora"), *output, "--base", str(runs / "other")]),
            main(["export", str(runs / "dense"), "--to", "hf-peft", *output]),
            main(["export", str(runs / "lora"), "--to", "hf", *output]),
        ]

    assert run_ranks(1, attempts, process_group=False) == [[2, 2, 2, 2]]
    whole, other, no_adapters, to_merge = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("bridge: ")
    ]
    assert "holds a full model and no adapters; give the checkpoint of a run" in whole
    assert "has other weights than" in other
    assert "holds a full model and no adapters; give the checkpoint of a run" in no_adapters
    assert "bridge merge" in to_merge
    assert not (tmp_path / "merged").exists()


def flip_a_bit(run: Path) -> Path:
    """Damage the newest checkpoint of a run; return the file."""
    [file] = run.glob("checkpoints/step-*/__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def test_damaged_weights_are_neither_exported_nor_merged(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("dense", "lora"):
        shutil.copytree(runs / name, tmp_path / name)
    damaged = [flip_a_bit(tmp_path / name) for name in ("dense", "lora")]
    dense, lora = (str(tmp_path / name) for name in ("dense", "lora"))

    def attempts() -> list[int]:
        output = ["--output", str(tmp_path / "made")]
        return [
            main(["export", dense, "--to", "hf", *output]),
            main(["export", lora, "--to", "hf-peft", *output]),
            main(["merge", str(runs / "lora"), *output, "--base", dense]),
            main(["merge", lora, *output]),
        ]

    assert run_ranks(1, attempts, process_group=False) == [[2] * 4]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bridge: ")]
    base, adapters = (f"bridge: {file}: has other content than was written" for file in damaged)
    for line, start in zip(lines, [base, adapters, base, adapters], strict=True):
        assert line.startswith(start)
    assert not (tmp_path / "made").exists()
