"""One process and two, in every layout: the same run."""

from pathlib import Path

from commands import run
from small_runs import SMALL, assert_close, losses

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


def test_four_processes_train_as_one_does(tmp_path: Path) -> None:
    layout = ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")
    one = train(tmp_path / "one")
    assert one[-1] < one[0] - 0.1
    assert_close(train(tmp_path / "four", *layout, ranks=4), one)


def test_experts_on_two_processes_train_as_on_one(tmp_path: Path) -> None:
    layout = (
        "model.tensor_model_parallel_size=2",
        "model.sequence_parallel=true",
        "model.expert_model_parallel_size=2",
        "model.expert_tensor_parallel_size=1",
    )
    one = train(tmp_path / "one", *MOE)
    assert_close(train(tmp_path / "two", *MOE, *layout, ranks=2), one)
