"""One process and two, in every layout: the same run."""

from pathlib import Path

import pytest

from commands import run
from small_runs import SMALL, assert_close, losses

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("layouts by command")]

MOE = (
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.moe_aux_loss_coeff=0.0",
    "model.moe_grouped_gemm=false",
)
# test_layouts_matrix.py has a sample of all layouts; tools/layouts.py takes 20 steps, in every one
# that there is.
STEPS = 6


def train(folder: Path, *overrides: str, ranks: int = 1) -> list[float]:
    arguments = (*SMALL, f"train.train_iters={STEPS}", "checkpoint.save_at_end=false", *overrides)
    ended = run(
        "pretrain", "gpt-tiny", *arguments, "--run-dir", "R", "--nproc", str(ranks), folder=folder
    )
    assert ended.code == 0, ended.err
    assert ended.err == ""
    found = losses(folder / "R")
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process; they fall."""
    found = train(tmp_path_factory.mktemp("alone"))
    assert found[-1] < found[0] - 0.1
    return found


def test_a_virtual_pipeline_of_two_processes_trains_as_one_does(
    tmp_path: Path, alone: list[float]
) -> None:
    layout = (
        "model.pipeline_model_parallel_size=2",
        "model.virtual_pipeline_model_parallel_size=2",
    )
    assert_close(train(tmp_path, *layout, ranks=2), alone)


def test_four_processes_train_as_one_does(tmp_path: Path, alone: list[float]) -> None:
    layout = ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")
    assert_close(train(tmp_path, *layout, ranks=4), alone)


def test_experts_on_two_processes_train_as_on_one(tmp_path: Path) -> None:
    layout = (
        "model.tensor_model_parallel_size=2",
        "model.sequence_parallel=true",
        "model.expert_model_parallel_size=2",
        "model.expert_tensor_parallel_size=1",
    )
    one = train(tmp_path / "one", *MOE)
    assert_close(train(tmp_path / "two", *MOE, *layout, ranks=2), one)
