"""The loop on one GPU: bf16 with Transformer Engine, and no waiting between logged steps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.gpt.conversion.hf_import import import_hf
from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.peft import CanonicalLoRA, DoRA, LoRA
from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from bridge.training.train import StepResult
from bridge.training.transformer.layer_specs import has_transformer_engine
from gpt_models import tiny_gpt
from hf_models import run_from, write_folder
from sft_data import write_rows
from sft_runs import LENGTH, ROWS, sft_run
from training_runs import a_run, gpt_run, one_step, parameters_of, series

pytestmark = pytest.mark.gpu

needs_engine = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_transformer_engine(),
    reason="needs Transformer Engine",
)
# Kernels of 16 bits need larger sizes than the tiniest GPT has.
SIZES: dict[str, Any] = {"hidden_size": 128, "ffn_hidden_size": 256, "seq_length": 64}


def gpt(layer_spec: str) -> Any:
    return tiny_gpt(num_layers=2, layer_spec=layer_spec, pipeline_dtype=None, **SIZES)


def run_of(directory: Path, layer_spec: str, precision: Any = "bf16") -> Any:
    config = gpt_run(directory, gpt(layer_spec), dataset=GPTDatasetConfig(mock=True))
    config.mixed_precision.precision = precision
    config.train.train_iters = 3
    return config


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@needs_engine
def test_weights_of_hugging_face_are_the_same_model_in_either_kind_of_layers(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    import_hf(write_folder(tmp_path / "model", **sizes), tmp_path / "checkpoint")
    losses = []
    for layer_spec in ("local", "transformer_engine"):
        config = run_from(tmp_path / "checkpoint", tmp_path / layer_spec, layer_spec=layer_spec)
        losses.append(pretrain(config, forward_step).metrics["lm loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@needs_engine
@pytest.mark.parametrize("kind", [LoRA, DoRA, CanonicalLoRA])
def test_adapters_train_alike_next_to_either_kind_of_layers(tmp_path: Path, kind: Any) -> None:
    base = run_of(tmp_path / "base", "local")
    base.checkpoint.save_at_end = True
    pretrain(base, forward_step)
    found = []
    for layer_spec in ("local", "transformer_engine"):
        config = run_of(tmp_path / layer_spec, layer_spec)
        config.peft = kind(dim=8)
        config.optimizer.lr = 5e-3
        config.checkpoint.pretrained_checkpoint = str(tmp_path / "base")
        pretrain(config, forward_step)
        found.append([series(tmp_path / layer_spec, name) for name in ("lm loss", "grad_norm")])
    (losses, norms), (losses_of_engine, norms_of_engine) = found
    assert losses_of_engine == pytest.approx(losses, rel=5e-3)
    # bf16 has 8 bits. Without the fused norm before the adapter the gradient would differ.
    assert norms_of_engine == pytest.approx(norms, rel=5e-2)


@needs_engine
def test_packed_rows_train_as_rows_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    found = []
    for name, packing in (("alone", False), ("packed", True)):
        engine = {"layer_spec": "transformer_engine", "pipeline_dtype": None}
        model = SIZES | engine | {"seq_length": LENGTH}
        config = sft_run(tmp_path / name, packing=packing, **model)
        config.mixed_precision.precision = "bf16"
        pretrain(config, forward_step)
        found.append([series(tmp_path / name, key) for key in ("lm loss", "grad_norm")])
    (losses, norms), (packed_losses, packed_norms) = found
    assert packed_losses == pytest.approx(losses, rel=3e-3)
    assert packed_norms == pytest.approx(norms, rel=3e-2)


@pytest.mark.parametrize(
    "layer_spec", ["local", pytest.param("transformer_engine", marks=needs_engine)]
)
def test_three_steps_in_bf16(tmp_path: Path, layer_spec: str) -> None:
    config = run_of(tmp_path / "run", layer_spec)
    config.checkpoint.save_at_end = True
    result = pretrain(config, forward_step)
    losses = series(tmp_path / "run", "lm loss")
    assert result.step == len(losses) == 3
    # Random tokens of 64 kinds: the logarithm of 64, more or less.
    assert all(3.9 < loss < 4.6 for loss in losses)
    assert result.metrics["memory_gb"] > 0


@needs_engine
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("layer_spec", ["local", "transformer_engine"])
def test_a_step_that_is_not_logged_has_no_host_device_sync(tmp_path: Path, layer_spec: str) -> None:
    """Without Transformer Engine's kernels megatron-core reads the gradients' norm to clip them."""
    config = run_of(tmp_path / "run", layer_spec)
    config.train.spike_factor = 3.0
    with a_run(config, forward_step) as run:
        data_iterator = run.parts.data.training(0)

        def step(**arguments: Any) -> StepResult:
            return one_step(
                run, data_iterator=data_iterator, reducer=run.parts.reducer, **arguments
            )

        for _ in range(2):  # Code that runs once may have a host-device sync.
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept = [step(is_logged=False) for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [result.metrics for result in kept] == [{}, {}]
        assert step().metrics.keys() == {"lm loss"}


def weights(directory: Path, layer_spec: str) -> list[torch.Tensor]:
    """Return the untrained weights on the host, in an order that needs no names.

    Names differ where Transformer Engine holds a norm and a matrix in one module.
    """
    with a_run(run_of(directory, layer_spec, "fp32"), forward_step) as run:
        values = [value.cpu() for value in parameters_of(run.parts.model).values()]
    return sorted(values, key=lambda value: (tuple(value.shape), value.flatten().tolist()))


def weights_without_a_gpu(directory: Path) -> list[torch.Tensor]:
    """Return the weights that a process without a visible GPU finds."""
    file = directory / "weights.pt"
    program = (
        "import sys, pathlib, torch; import test_gpu; "
        "torch.save(test_gpu.weights(pathlib.Path(sys.argv[1]), 'local'), sys.argv[2])"
    )
    here = Path(__file__).parent
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)]),
    }
    arguments = [sys.executable, "-c", program, str(directory / "cpu"), str(file)]
    subprocess.run(arguments, env=environment, check=True, timeout=100)
    found: list[torch.Tensor] = torch.load(file)
    return found


@pytest.mark.parametrize(
    "layer_spec", ["local", pytest.param("transformer_engine", marks=needs_engine)]
)
def test_the_weights_depend_on_neither_device_nor_modules(tmp_path: Path, layer_spec: str) -> None:
    on_cpu, on_gpu = weights_without_a_gpu(tmp_path), weights(tmp_path / "gpu", layer_spec)
    assert len(on_cpu) == len(on_gpu)
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(one, other)
