"""One process and two, in every layout: the same run."""

from pathlib import Path

from commands import run
from gpt_tiny_runs import SMALL, assert_close, logged_steps

MOE = (
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.moe_router_load_balancing_type=seq_aux_loss",
    "model.moe_aux_loss_coeff=0.01",
    "model.moe_grouped_gemm=false",
)
# test_layouts_matrix.py has a sample of all layouts; tools/layouts.py takes 20 steps in each.
STEPS = 6


type Curves = dict[str, list[float]]
"""Every loss and the gradient norm, at every step."""


def train(folder: Path, *overrides: str, ranks: int = 1) -> Curves:
    arguments = (*SMALL, f"train.train_iters={STEPS}", "checkpoint.save_at_end=false", *overrides)
    ended = run(
        "pretrain", "gpt-tiny", *arguments, "--run-dir", "R", "--nproc", str(ranks), folder=folder
    )
    assert ended.code == 0, ended.err
    assert ended.err == ""
    found = logged_steps(folder / "R")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    names = [name for name in found[0] if name.endswith("loss") or name == "grad_norm"]
    return {name: [row[name] for row in found] for name in names}


def assert_equal_curves(actual: Curves, expected: Curves) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(actual[name], values)


def test_four_processes_train_as_one_does(tmp_path: Path) -> None:
    layout = ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")
    one = train(tmp_path / "one")
    assert one["lm loss"][-1] < one["lm loss"][0] - 0.1
    assert_equal_curves(train(tmp_path / "four", *layout, ranks=4), one)


def test_experts_on_two_processes_train_as_on_one(tmp_path: Path) -> None:
    layout = (
        "model.tensor_model_parallel_size=2",
        "model.sequence_parallel=true",
        "model.expert_model_parallel_size=2",
        "model.expert_tensor_parallel_size=1",
    )
    one = train(tmp_path / "one", *MOE)
    assert one.keys() == {"lm loss", "seq_load_balancing_loss", "grad_norm"}
    assert_equal_curves(train(tmp_path / "two", *MOE, *layout, ranks=2), one)
