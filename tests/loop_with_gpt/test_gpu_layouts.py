"""Two GPUs, bf16, Transformer Engine: every layout of them trains as one GPU does.

Each launch trains all cases in one process a rank, since starting takes longer than training.
"""

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from bridge.training.transformer.layer_specs import has_transformer_engine
from gpt_models import microbatch, tiny_gpt
from training_runs import gpt_run, series

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or not has_transformer_engine(),
        reason="needs two GPUs and Transformer Engine",
    ),
]

# Series by their names, of each case; the traceback of one that failed.
type Found = dict[str, dict[str, list[float]]]

STEPS = 10
LENGTH = 256
# bf16 has 8 bits: what each layout rounds differently. A wrong factor would be 2 or 1/2.
LOSS, NORM = 3e-3, 3e-2

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "virtual": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "expert": {"expert_model_parallel_size": 2},
    "expert-alltoall": {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
}
EXPERTS: dict[str, Any] = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.0}


@dataclass(kw_only=True)
class Samples:
    """Random tokens with uneven masks; `packed` into documents of uneven lengths."""

    packed: bool

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        sample = {name: tensor[0] for name, tensor in microbatch(index, length=LENGTH).items()}
        # From no counted token to all of them.
        sample["loss_mask"][: LENGTH * (index % 5) // 4] = 0
        if self.packed:
            # Multiples of 4, as context parallelism on two ranks needs.
            first, second = 4 * (5 + index % 20), 4 * (40 + index % 9)
            ends = torch.tensor([0, first, second, LENGTH], dtype=torch.int32)
            starts = torch.repeat_interleave(ends[:-1], ends.diff())
            sample |= {"cu_seqlens": ends, "position_ids": torch.arange(LENGTH) - starts}
        return sample


@dataclass(kw_only=True)
class Data:
    """The section that builds `Samples`."""

    packed: bool = False

    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(train=Samples(packed=self.packed))


def case(
    folder: Path,
    *,
    packed: bool = False,
    normalization: Any = "token",
    **model: Any,
) -> dict[str, list[float]]:
    """Train one case; return its losses and gradient norms."""
    sizes = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "seq_length": LENGTH}
    values = {"layer_spec": "transformer_engine", "pipeline_dtype": None} | sizes | model
    config = gpt_run(folder, tiny_gpt(**values), dataset=Data(packed=packed))
    config.train.train_iters = STEPS
    config.train.loss_normalization = normalization
    config.optimizer.lr = 3e-3
    config.mixed_precision.precision = "bf16"
    config.dist.timeout_minutes = 0.5
    pretrain(config, forward_step)
    return {name: series(folder, name) for name in ("lm loss", "grad_norm")}


def cases(ranks: int) -> dict[str, dict[str, Any]]:
    """Return the cases of a launch by their names, ``KIND/LAYOUT``."""
    kinds: dict[str, dict[str, Any]] = {
        "dense": {},
        "microbatch": {"normalization": "microbatch"},
        "packed": {"packed": True},
        "experts": EXPERTS,
    }
    if ranks == 1:
        kinds["local"] = {"packed": True, "layer_spec": "local"}
        return kinds
    found: dict[str, dict[str, Any]] = {
        f"{kind}/{layout}": values | sizes
        for kind, values in kinds.items()
        for layout, sizes in LAYOUTS.items()
        # megatron-core trains experts under tensor parallelism with sequence parallelism only.
        if (kind, layout) != ("experts", "tensor")
    }
    for layout, sizes in EXPERT_LAYOUTS.items():
        found[f"experts/{layout}"] = EXPERTS | sizes
    return found


def launch(ranks: int, folder: Path) -> Found:
    """Train all cases of so many ranks."""
    here = Path(__file__)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent), *filter(None, sys.path)]),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(here), str(folder)]
    with contextlib.suppress(subprocess.TimeoutExpired, subprocess.CalledProcessError):
        # Cases that were not reached are missing from what is found.
        subprocess.run(command, env=environment, check=True, timeout=300)
    found: Found = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch(1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch(2, tmp_path_factory.mktemp("together"))


@pytest.mark.timeout(600)
def test_the_runs_learn(alone: Found) -> None:
    for kind, found in alone.items():
        assert len(found["lm loss"]) == STEPS, kind
        assert found["lm loss"] != [found["lm loss"][0]] * STEPS, kind


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", cases(2))
def test_two_gpus_train_as_one_does(
    alone: Found,
    together: Found,
    name: str,
    record_property: Callable[[str, object], None],
) -> None:
    expected, found = alone[name.partition("/")[0]], together.get(name, "not reached")
    assert isinstance(found, dict), found
    deviations = {series: worst(found[series], expected[series]) for series in found}
    for series_name, deviation in deviations.items():
        record_property(series_name, deviation)
    assert deviations["lm loss"] < LOSS
    assert deviations["grad_norm"] < NORM


@pytest.mark.timeout(600)
def test_transformer_engine_keeps_packed_documents_apart_as_the_local_attention_does(
    alone: Found,
) -> None:
    assert worst(alone["packed"]["lm loss"], alone["local"]["lm loss"]) < LOSS
    assert worst(alone["packed"]["grad_norm"], alone["local"]["grad_norm"]) < NORM
    # If documents attended to each other, the loss would differ.
    assert worst(alone["packed"]["lm loss"], alone["dense"]["lm loss"]) > 1e-4


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    results: dict[str, Any] = {}
    for name, values in cases(size).items():
        try:
            results[name] = case(place / name.replace("/", "-"), **values)
        except Exception:  # reported by the test of that case
            results[name] = traceback.format_exc()
        if rank == 0:
            (place / "found.json").write_text(json.dumps(results))
