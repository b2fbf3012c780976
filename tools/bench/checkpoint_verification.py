"""Time that continuing from a checkpoint takes, with and without the comparison with its manifest.

    uv run python tools/bench/checkpoint_verification.py [--layers 6] [--repeats 5]

One process on the CPU builds a GPT of 12.6M parameters a layer, its data and its optimizer, and
restores a checkpoint of them (16 bytes a parameter: 6 layers are 1.2 GB), alternately without and
with `bridge.training.checkpoint.verification.Verification`. Files come from the page cache.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bridge.gpt import recipes
from bridge.training import setup
from bridge.training.checkpoint.manifest import record_files
from bridge.training.checkpoint.verification import Verification
from bridge.training.config import ConfigContainer, apply_overrides
from bridge.training.gpt_step import forward_step
from bridge.training.setup import training_parts

Seconds = dict[str, list[float]]


class NoVerification:
    """A verification that checks nothing, in place of `Verification`."""

    def __init__(self, *arguments: object) -> None:
        pass

    def explaining_errors(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Find nothing."""

    def close(self) -> None:
        """Do nothing: there are no threads."""


def main() -> None:
    """Save a checkpoint and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verification-", dir=".") as folder:
        config = run_config(Path(folder) / "run", options.layers)
        with training_parts(config, forward_step) as parts:
            checkpoint = parts.checkpointer.save()
        assert checkpoint is not None
        files = sorted(checkpoint.glob("*.distcp"))
        size = sum(path.stat().st_size for path in files)
        cpu, wall = time.process_time(), time.perf_counter()
        record_files(files)
        print(
            f"{size / 1e9:.2f} GB on {os.cpu_count()} cores: checksums alone "
            f"{time.perf_counter() - wall:.2f} s ({time.process_time() - cpu:.2f} s of CPU)"
        )
        config.checkpoint.resume = True
        print(f"resume: {alternately(lambda: restore(config), options.repeats)}")


def run_config(run: Path, layers: int) -> ConfigContainer:
    """Return a run on mock data whose checkpoint is large."""
    return apply_overrides(
        recipes.gpt_tiny(),
        [
            f"checkpoint.run_dir={run}",
            f"model.num_layers={layers}",
            "model.hidden_size=1024",
            "model.ffn_hidden_size=4096",
            "dataset.mock=true",
            "dataset.standard_library=false",
            "train.train_iters=10",
        ],
    )


def restore(config: ConfigContainer) -> None:
    """Build everything that a run needs, with the checkpoint loaded."""
    with training_parts(config, forward_step):
        pass


def alternately(function: Callable[[], None], repeats: int) -> str:
    """Return what a function takes without and with verification of what set-up reads."""
    found: Seconds = {"without": [], "with": []}
    for _ in range(repeats):
        for name, kind in (("without", NoVerification), ("with", Verification)):
            setattr(setup, "Verification", kind)  # noqa: B010  # not exported for callers
            found[name].append(seconds_of(function))
    return in_words(found)


def seconds_of(function: Callable[[], None]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_words(found: Seconds) -> str:
    """Return the medians of both, and their ratio."""
    without, both = (statistics.median(found[name]) for name in ("without", "with"))
    change = 100 * (both / without - 1)
    return f"{without:.2f} s without, {both:.2f} s with verification ({change:+.1f} %)"


if __name__ == "__main__":
    main()
