"""Two GPUs: the recipe of digits loses the same on one, on both, and module by module."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training_runs import series

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

STEPS = 20
# 16 bits would round more than what is compared, and Transformer Engine attends in no others.
FLOAT32 = (
    "mixed_precision.precision=fp32",
    "model.language.layer_spec=local",
    "model.encoders.vision.layer_spec=local",
)
LAYOUTS = {
    "alone": (),
    "colocated": ("--nproc", "2"),
    "separate": ("--nproc", "2", "model.placement=separate"),
}


def losses(folder: Path, *arguments: str, precision: tuple[str, ...] = FLOAT32) -> list[float]:
    """Train the recipe's first steps by command, and return their losses."""
    command = [sys.executable, "-m", "bridge.cli", "pretrain", "mimo-digits"]
    steps = ("logger.log_interval=1", f"train.train_iters={STEPS}", "scheduler.lr_decay_iters=600")
    quiet = ("validation.eval_iters=0", "checkpoint.save_at_end=false", "logger.tensorboard=false")
    ended = subprocess.run(
        [*command, *steps, *quiet, *precision, *arguments, "--run-dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = series(folder, "lm loss")
    assert len(found) == STEPS
    return found


@pytest.mark.timeout(900)
def test_digits_lose_the_same_in_every_placement(tmp_path: Path) -> None:
    found = {name: losses(tmp_path / name, *layout) for name, layout in LAYOUTS.items()}
    assert found["alone"][-1] < found["alone"][0]
    for name, of_layout in found.items():
        assert of_layout == pytest.approx(found["alone"], rel=1e-4), name


@pytest.mark.timeout(900)
def test_in_16_bits_they_lose_nearly_the_same(tmp_path: Path) -> None:
    found = {
        name: losses(tmp_path / name, *layout, precision=()) for name, layout in LAYOUTS.items()
    }
    for name, of_layout in found.items():
        assert of_layout == pytest.approx(found["alone"], rel=3e-2), name
