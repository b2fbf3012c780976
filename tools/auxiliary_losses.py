"""Compare one step's auxiliary losses with their definitions, under every layout; print a table.

    python tools/auxiliary_losses.py [--only PHRASE ...] [--timeout 120]

Each row is a step of the loop on CPU ranks: a small GPT with experts or several predicted tokens,
uneven loss masks and, where it says so, padding at the end of samples. Columns: how far the loss,
the largest deviation among the auxiliary metrics, the gradient norm and all gradients together are
from the objective written out in one process, relative to their size. The batch-level balance loss
belongs to a micro batch size, the other losses do not; each row has a reference of its own sizes.
`--only` keeps the rows that have all the phrases, such as "micro 2". Ends with 1 if a row is off by
more than 1e-5.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from bridge.training.megatron_import import quiet_import
from ranks import run_ranks

with quiet_import():
    from auxiliary_loss_definitions import (
        LAYOUTS,
        Found,
        Objective,
        step_by_definition,
        step_of_ours,
    )

TOLERANCE = 1e-5
MORE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data4": (4, {}),
    "context4": (4, {"context_parallel_size": 4}),
    "tensor x context": (4, LAYOUTS["tensor"][1] | {"context_parallel_size": 2}),
    "tensor x pipeline": (4, LAYOUTS["tensor"][1] | {"pipeline_model_parallel_size": 2}),
    "tensor x expert": (4, LAYOUTS["tensor"][1] | {"expert_model_parallel_size": 2}),
    "recomputed": (
        1,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}
LOSSES: dict[str, dict[str, Any]] = {
    "z": {"z": 0.5},
    "sequence": {"sequence": 1.0},
    "batch": {"batch": 1.0},
    "ahead 1": {"ahead": 1},
    "ahead 2": {"ahead": 2},
    "all": {"z": 0.5, "sequence": 1.0, "batch": 0.7, "ahead": 2},
}


def rows() -> Iterator[tuple[str, Objective, str]]:
    """Yield each row's name, objective and layout."""
    layouts = LAYOUTS | MORE_LAYOUTS
    for (losses, values), normalization, pattern, padded, size, layout in product(
        LOSSES.items(), ("token", "microbatch"), (1, 2), (False, True), (1, 2, 4), layouts
    ):
        has_experts = values.keys() != {"ahead"}
        ranks, sizes = layouts[layout]
        microbatches = 8 // size
        if (padded and not has_experts) or (
            not has_experts and "expert_model_parallel_size" in sizes
        ):
            continue
        if layout == "virtual" and microbatches % 2:
            continue
        if layout == "data4" and microbatches % 4:
            continue
        objective = Objective(
            normalization=normalization,
            pattern=pattern,
            padded=padded,
            micro_batch_size=size,
            **values,
        )
        padding = "padded" if padded else "-"
        sizes_of_row = f"pattern {pattern}  {padding:7} micro {size}"
        yield f"{losses:9} {normalization:11} {sizes_of_row}  {layout:18}", objective, layout


@cache
def wanted(objective: Objective) -> Found:
    """Return what the definitions say."""
    return run_ranks(1, step_by_definition, objective, timeout=120)[0]


def deviations(found: Found, reference: Found) -> list[float]:
    """Return the relative deviations of loss, auxiliary metrics, norm and gradients."""
    assert found.metrics.keys() == reference.metrics.keys()
    apart = {
        name: abs((found.metrics[name] or 0.0) / (value or 1.0) - 1.0)
        for name, value in reference.metrics.items()
    }
    loss = apart.pop("lm loss")
    norm = abs(found.grad_norm / reference.grad_norm - 1.0)
    return [loss, max(apart.values()), norm, found.deviation(reference)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="PHRASE")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of a row")
    arguments = parser.parse_args()
    chosen = [
        row for row in rows() if all(only in " ".join(row[0].split()) for only in arguments.only)
    ]
    warnings.filterwarnings("ignore", module="megatron")
    print(" " * 66 + "     loss   metrics      norm gradients", flush=True)
    worst = 0.0
    for name, objective, layout in chosen:
        ranks, sizes = (LAYOUTS | MORE_LAYOUTS)[layout]

        step = partial(step_of_ours, objective, **sizes)
        found = run_ranks(ranks, step, timeout=arguments.timeout)
        numbers = deviations(found[0], wanted(objective))
        if any(of_rank.metrics != found[0].metrics for of_rank in found):
            numbers[1] = float("inf")
        worst = max(worst, *numbers)
        print(name + "".join(f" {number:9.1e}" for number in numbers), flush=True)
    print(f"{len(chosen)} rows, the largest deviation is {worst:.1e}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
