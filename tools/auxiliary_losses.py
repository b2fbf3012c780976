"""Compare one step's auxiliary losses with their definitions, under every layout; print a table.

    python tools/auxiliary_losses.py [--only PHRASE ...] [--timeout 120]

Each row is a step of the loop on CPU ranks: a small GPT with experts or MTP layers, uneven loss
masks and, in the rows that say so, padding at the end of samples. The columns are relative
deviations from the objective written out in one process: of the loss, the largest among the
auxiliary metrics, of the gradient norm, of all gradients together. The batch-level load-balancing
loss depends on the micro batch size, so each row has a reference with its own sizes. `--only` keeps
the rows that have all the phrases, such as "micro 2". Exit code 1 if a row is off by more than
1e-5.
"""

import argparse
import sys

from campaign import Campaign

TEST = (
    "tests/loop_with_gpt/test_auxiliary_losses.py::test_every_layout_finds_what_the_definitions_say"
)
TOLERANCE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="PHRASE")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of a row")
    options = vars(parser.parse_args())
    print(" " * 66 + "     loss   metrics      norm gradients", flush=True)
    rows, worst = 0, 0.0
    campaign = Campaign(name="auxiliary_losses", test=TEST, options=options)
    for found in campaign:
        # The largest of any rank.
        numbers = list(map(max, zip(*found["deviations"], strict=True)))
        rows, worst = rows + 1, max(worst, *numbers)
        print(found["name"] + "".join(f" {number:9.1e}" for number in numbers), flush=True)
    print(f"{rows} rows, the largest deviation is {worst:.1e}")
    return campaign.has_failed or not worst <= TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
