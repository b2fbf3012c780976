"""Train a tiny multimodal model in every layout and compare each run with one process.

    python tools/mimo_layouts.py             # encoder DP 1, 2, 4 x language DP 1, 2; TP; PP
    python tools/mimo_layouts.py --ranks 4   # those that take at most so many ranks

Everything runs on the CPU, over gloo, in float32, from the same initial weights and on the same
samples, for both normalizations of the loss. Some samples have no image, nor do some microbatches
or a rank's part of others. Compared are the loss and the gradient norm of three steps, and every
gradient of the first after the reduction and before clipping, separately for the encoder (with its
projection) and the language model.

The gradients' deviations are relative to the largest gradient. Layouts add the same numbers in
another order, which costs about 1e-7; a wrong factor in the encoder's gradients makes 5e-1.

Exit code 1 if anything is beyond 1e-5.
"""

import argparse

from campaign import Campaign

TEST = "tests/steps_mimo/test_separate.py::test_gradients_are_those_of_one_process"
ALLOWED = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="leave out what takes more")
    options = vars(parser.parse_args())
    print("| normalization | layout | ranks | loss | gradient norm | encoder | language model |")
    print("|---|---|---|---|---|---|---|")
    wrong = 0
    campaign = Campaign(name="mimo_layouts", test=TEST, options=options)
    for found in campaign:
        numbers = [found[name] for name in ("loss", "grad_norm", "encoder", "language")]
        wrong += not max(numbers) <= ALLOWED
        names = f"{found['normalization']} | {found['layout']} | {found['ranks']}"
        print(f"| {names} | {' | '.join(f'{number:.1e}' for number in numbers)} |", flush=True)
    print(f"\n{wrong} of them not as one process")
    return bool(wrong) or campaign.has_failed


if __name__ == "__main__":
    raise SystemExit(main())
