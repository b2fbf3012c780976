"""Train a tiny multimodal model in every layout and compare each run with one process.

    python tools/mimo_layouts.py             # encoder DP 1, 2, 4 x language DP 1, 2; TP; PP
    python tools/mimo_layouts.py --ranks 4   # those that take at most so many ranks

Everything runs on the CPU, over gloo, in float32, from the same initial weights and on the same
samples, of which some have no image: so have some microbatches, and the parts of others that single
ranks see. Both normalisations of the loss. Compared are the loss and the gradient norm of three
steps and every gradient of the first, after the reduction and before clipping, encoder (with its
projection) and language model apart.

The gradients' deviations are parts of the largest gradient. Layouts add the same numbers in another
order, which costs about 1e-7; an encoder whose gradients have another factor is off by 5e-1.

Exit code 1 if anything is beyond 1e-5.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from mimo_layout_runs import (
    ALONE,
    Deviations,
    MimoLayout,
    Sizes,
    Steps,
    deviations,
    run_in_layout,
    train_steps,
)
from ranks import run_ranks

ALLOWED = 1e-5

type Normalization = Literal["token", "microbatch"]


def layouts() -> Iterator[MimoLayout]:
    """Yield the matrix of copies, then layouts with parts of modules on ranks of their own."""
    for copies in (1, 2):
        yield MimoLayout(language=Sizes(data=copies))
    yield MimoLayout(language=Sizes(tensor=2))
    for encoders, copies in product((1, 2, 4), (1, 2)):
        yield MimoLayout(vision=Sizes(data=encoders), language=Sizes(data=copies))
    for vision, language in (
        (Sizes(tensor=2), Sizes()),
        (Sizes(), Sizes(tensor=2)),
        (Sizes(tensor=2), Sizes(tensor=2)),
        (Sizes(pipeline=2), Sizes()),
        (Sizes(), Sizes(pipeline=2)),
        (Sizes(pipeline=2), Sizes(pipeline=2)),
        (Sizes(tensor=2), Sizes(pipeline=2)),
        (Sizes(pipeline=2, data=2), Sizes(data=1)),
        (Sizes(pipeline=2), Sizes(data=2)),
        (Sizes(data=2), Sizes(tensor=2)),
        (Sizes(data=2), Sizes(pipeline=2, data=2)),
        (Sizes(tensor=2), Sizes(tensor=2, data=2)),
        (Sizes(tensor=2, data=2), Sizes(tensor=2)),
    ):
        yield MimoLayout(vision=vision, language=language)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="leave out what takes more")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # megatron-core advises about CUDA
    print("| normalisation | layout | ranks | loss | gradient norm | encoder | language model |")
    print("|---|---|---|---|---|---|---|")
    wrong = 0
    normalizations: tuple[Normalization, ...] = ("token", "microbatch")
    for normalization in normalizations:
        alone = steps_in(ALONE, normalization)
        for layout in layouts():
            if layout.ranks > arguments.ranks:
                continue
            found = deviations(steps_in(layout, normalization), alone)
            wrong += is_wrong(found)
            numbers = (found.loss, found.grad_norm, found.encoder, found.language)
            cells = " | ".join(f"{number:.1e}" for number in numbers)
            print(f"| {normalization} | {layout.name} | {layout.ranks} | {cells} |", flush=True)
    print(f"\n{wrong} of them not as one process")
    return bool(wrong)


def steps_in(layout: MimoLayout, normalization: Normalization) -> Steps:
    """Return what every rank has found, after a check that they agree."""

    def on_a_rank() -> Steps:
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            return train_steps(run_in_layout(Path(directory) / "run", layout, normalization))

    first, *others = run_ranks(layout.ranks, on_a_rank, timeout=300)
    for other in others:
        if (other.losses, other.grad_norms) != (first.losses, first.grad_norms):
            raise SystemExit(f"{layout.name}: ranks disagree")
    return first


def is_wrong(found: Deviations) -> bool:
    return not max(found.loss, found.grad_norm, found.encoder, found.language) <= ALLOWED


if __name__ == "__main__":
    raise SystemExit(main())
