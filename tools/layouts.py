"""Train small GPTs in every parallel layout and compare each run with one process.

    python tools/layouts.py                          # the complete matrix
    python tools/layouts.py --quick                  # a sample of it
    python tools/layouts.py --models gpt2 'experts*' --layouts 'TP*' PP2

Everything runs on the CPU, over gloo, with the seed and the global batches of the run on one
process. Masks differ between samples; some count no token. Compared are the loss and the gradient
norm of every step, the evaluation (its loss, and what the loss function returns when it is asked
for other data, microbatch by microbatch), and every parameter at the end. Weights at the start, and
what two ranks hold of the same parameter, must be equal bit for bit.

With token normalisation of sums the size of the microbatches differs between layouts, as it must
not matter; other objectives, and models whose loss is not linear in the tokens, are compared at one
size.

Tolerances: layouts add the same numbers in another order, which in float32 costs about 1e-7 a step
(each number of the tables is of that size) and may grow tenfold where a run is less stable. What is
wrong is far off: one token counted twice, or left out, of the 50 of a step is 2e-2. Adam divides
each gradient by its size, so where the gradient should be 0 (the bias of the keys, which softmax
cancels) the rounding itself is trained on, at a part of the learning rate; hence the parameters'
tolerance. bf16 has 8 bits.

Exit code 1 if anything is beyond its tolerance.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby

from layouts_cases import Case, complete, sample
from layouts_runs import MEASURES, Deviation, Outcome, deviation, train_all, worst


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case, and how far it is from one process; None if it did not come to its end."""

    case: Case
    deviation: Deviation | None
    failure: str = ""

    @property
    def excesses(self) -> list[str]:
        """What is beyond its tolerance."""
        if self.deviation is None:
            return []
        return self.deviation.excesses(self.case.model.precision)

    @property
    def is_wrong(self) -> bool:
        return self.deviation is None or bool(self.deviation.faults or self.excesses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a sample of the matrix")
    parser.add_argument("--models", nargs="*", default=["*"], help="names, or patterns of names")
    parser.add_argument("--layouts", nargs="*", default=["*"], help="names, or patterns of names")
    arguments = parser.parse_args()
    cases = [
        case
        for case in (sample() if arguments.quick else complete())
        if any(fnmatch(case.model.name, pattern) for pattern in arguments.models)
        and any(fnmatch(case.layout.name, pattern) for pattern in arguments.layouts)
    ]
    if not cases:
        parser.error("no case has such a model and such a layout")
    warnings.simplefilter("ignore")  # megatron-core advises about CUDA
    begin = time.monotonic()
    results = list(run(cases))
    minutes = (time.monotonic() - begin) / 60
    print("\n".join(table(results)))
    print()
    print("\n".join(summary(results)))
    wrong = [result for result in results if result.is_wrong]
    for result in wrong:
        print(f"\n{title(result.case)}\n{reason(result)}")
    print(f"\n{len(cases)} runs in {minutes:.0f} min, {len(wrong)} of them not as one process")
    return bool(wrong)


def run(cases: Sequence[Case]) -> Iterator[Result]:
    """Train the cases, those of a model, an objective and a number of ranks in one go."""
    for alone, group in groupby(cases, key=Case.alone):
        of_model = list(group)
        [reference] = train_all([alone])
        for ranks in sorted({case.layout.ranks for case in of_model}):
            batch = [case for case in of_model if case.layout.ranks == ranks]
            begin = time.monotonic()
            for case, traces in zip(batch, train_all(batch), strict=True):
                yield compared(case, traces, reference)
            note = f"{alone.model.name}, {alone.objective}, {ranks} ranks: {len(batch)} runs in"
            print(f"{note} {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def compared(case: Case, traces: Outcome, reference: Outcome) -> Result:
    if isinstance(reference, str):
        return Result(case=case, deviation=None, failure=f"on one process: {reference}")
    if isinstance(traces, str):
        return Result(case=case, deviation=None, failure=traces)
    return Result(case=case, deviation=deviation(case, traces, reference[0]))


def title(case: Case) -> str:
    return f"{case.model.name}, {case.layout.name}, {case.objective}"


def reason(result: Result) -> str:
    """Say what is wrong with a result."""
    if result.deviation is None:
        return result.failure
    return "\n".join(
        [*(f"{name} is beyond its tolerance" for name in result.excesses), *result.deviation.faults]
    )


def table(results: Iterable[Result]) -> Iterator[str]:
    """Yield a markdown table of all results."""
    yield "| model | objective | layout | ranks | loss | gradient norm | evaluation | parameters |"
    yield "|---|---|---|---|---|---|---|---|"
    for result in results:
        case = result.case
        names = f"{case.model.name} | {case.objective} | {case.layout.name} | {case.layout.ranks}"
        yield f"| {names} | {' | '.join(_cells([result]))} |"


def summary(results: Sequence[Result]) -> Iterator[str]:
    """Yield a markdown table of the worst of each kind of layout."""
    yield "| layouts | models | loss | gradient norm | evaluation | parameters |"
    yield "|---|---|---|---|---|---|"
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        model = result.case.model
        what = "bf16" if model.precision == "bf16" else "experts" if model.has_experts else "dense"
        groups.setdefault((result.case.layout.kind, what), []).append(result)
    for (kind, what), group in sorted(groups.items(), key=lambda item: item[0][1] == "bf16"):
        names = ", ".join(dict.fromkeys(result.case.layout.name for result in group))
        yield f"| {kind}: {names} | {what} | {' | '.join(_cells(group))} |"


def _cells(results: Sequence[Result]) -> Iterator[str]:
    for name in MEASURES:
        if any(result.deviation is None for result in results):
            yield "**failed**"
            continue
        number = f"{worst(getattr(result.deviation, name) for result in results):.1e}"
        yield f"**{number}**" if any(name in result.excesses for result in results) else number


if __name__ == "__main__":
    sys.exit(main())
