"""Train small GPTs in every parallel layout and compare each run with one process.

    python tools/layouts.py                          # the complete matrix
    python tools/layouts.py --quick                  # a sample of it
    python tools/layouts.py --models gpt2 'experts*' --layouts 'TP*' PP2

Everything runs on the CPU, over gloo, with the seed and the global batches of the run on one
process. Masks differ between samples; some count no token. Compared are the loss and the gradient
norm of every step, the evaluation (its loss, and the loss function's other data, microbatch by
microbatch), and every parameter at the end. Weights at the start, and the replicas of a parameter,
must be equal bit for bit.

With token normalization of sums the size of the microbatches differs between layouts, since it must
not matter. Other objectives, and models whose loss is not linear in the tokens, are compared at one
size.

Tolerances: layouts add the same numbers in another order, which in float32 costs about 1e-7 a step
(each number of the tables is of that size) and may grow tenfold where a run is less stable. An
error is far larger: of the 50 tokens of a step, one that is skipped or counted twice makes 2e-2.
Adam divides each gradient by its size. Where the gradient should be 0 (the bias of the keys, which
softmax cancels) it trains on the rounding errors, at a part of the learning rate; hence the
parameters' tolerance. bf16 has 8 bits.

Exit code 1 if anything is beyond its tolerance.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from campaign import Campaign

TEST = "tests/loop_with_gpt/test_layouts_matrix.py::test_a_layout_trains_as_one_process_does"
MEASURES = ("loss", "grad_norm", "evaluation", "parameters")

type Result = dict[str, Any]
"""A case, its `MEASURES` (None if it did not come to its end), and what is wrong with them."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a sample of the matrix")
    parser.add_argument("--models", nargs="*", default=["*"], help="names, or patterns of names")
    parser.add_argument("--layouts", nargs="*", default=["*"], help="names, or patterns of names")
    options = vars(parser.parse_args())
    begin = time.monotonic()
    results = []
    campaign = Campaign(name="layouts", test=TEST, options=options)
    for result in campaign:
        results.append(result)
        print(f"{title(result)}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    if not results:
        parser.error("no case has such a model and such a layout, or none came to its end")
    minutes = (time.monotonic() - begin) / 60
    print("\n".join(table(results)))
    print()
    print("\n".join(summary(results)))
    wrong = [result for result in results if result["problems"]]
    for result in wrong:
        print("", title(result), *result["problems"], sep="\n")
    print(f"\n{len(results)} runs in {minutes:.0f} min, {len(wrong)} of them not as one process")
    return campaign.has_failed


def title(result: Result) -> str:
    return f"{result['model']}, {result['layout']}, {result['objective']}"


def table(results: Iterable[Result]) -> Iterator[str]:
    """Yield a markdown table of all results."""
    yield "| model | objective | layout | ranks | loss | gradient norm | evaluation | parameters |"
    yield "|---|---|---|---|---|---|---|---|"
    for result in results:
        names = " | ".join(str(result[name]) for name in ("model", "objective", "layout", "ranks"))
        yield f"| {names} | {' | '.join(_cells([result]))} |"


def summary(results: Sequence[Result]) -> Iterator[str]:
    """Yield a markdown table of the worst of each kind of layout."""
    yield "| layouts | models | loss | gradient norm | evaluation | parameters |"
    yield "|---|---|---|---|---|---|"
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        models = "experts" if result["has_experts"] else "dense"
        if result["precision"] == "bf16":
            models = "bf16"
        groups.setdefault((result["kind"], models), []).append(result)
    for (kind, models), group in sorted(groups.items(), key=lambda item: item[0][1] == "bf16"):
        names = ", ".join(dict.fromkeys(result["layout"] for result in group))
        yield f"| {kind}: {names} | {models} | {' | '.join(_cells(group))} |"


def _cells(results: Sequence[Result]) -> Iterator[str]:
    for name in MEASURES:
        numbers = [result[name] for result in results]
        if None in numbers:
            yield "**failed**"
            continue
        problems = [problem for result in results for problem in result["problems"]]
        # NaN is the largest, which Python's own max may pass over.
        number = f"{max(numbers, key=lambda value: (value != value, value)):.1e}"
        is_beyond = f"{name} is beyond its tolerance" in problems
        yield f"**{number}**" if is_beyond else number


if __name__ == "__main__":
    sys.exit(main())
