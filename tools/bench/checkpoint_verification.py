"""Time that a checkpoint takes to load, with and without the comparison with its manifest.

    uv run python tools/bench/checkpoint_verification.py [--gigabytes 1] [--repeats 5]

One process on the CPU reads all weights of a checkpoint, alternately without and with
`bridge.training.checkpoint_manifest.verified`: first from the page cache, then from the disk.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.model_config import GPTModelConfig
from bridge.training.checkpoint_manifest import record_files, verified, write_manifest
from bridge.training.checkpoint_weights import write_weights
from bridge.training.config import ConfigContainer
from bridge.training.distributed import one_process

LAYERS = 16


def main() -> None:
    """Write a checkpoint and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    numbers = int(options.gigabytes * 1e9 / 4 / LAYERS)
    weights = {f"decoder.layers.{layer}.weight": torch.randn(numbers) for layer in range(LAYERS)}
    model = GPTModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config = ConfigContainer(model=model, dataset=GPTDatasetConfig())
    with tempfile.TemporaryDirectory(prefix="verification-", dir=".") as folder, one_process():
        checkpoint = Path(folder)
        write_weights(checkpoint, weights, config)
        files = sorted(checkpoint.glob("*.distcp"))
        size = sum(path.stat().st_size for path in files)
        seconds = median(lambda: record_files(files), options.repeats)
        start = time.process_time()
        record_files(files)
        used = time.process_time() - start
        print(
            f"{size / 1e9:.2f} GB on {os.cpu_count()} cores; checksums alone {seconds:.2f} s "
            f"({used:.2f} s of CPU)"
        )
        seconds = median(lambda: write_manifest(checkpoint), options.repeats)
        print(f"manifest, as in a save: {seconds:.2f} s")
        for place, forget in (("page cache", False), ("disk", True)):
            compare(checkpoint, numbers, options.repeats, place, forget=forget)


def compare(checkpoint: Path, numbers: int, repeats: int, place: str, *, forget: bool) -> None:
    """Print what loading takes without and with the comparison."""

    def plain() -> None:
        load(checkpoint, numbers)

    def compared() -> None:
        with verified(checkpoint):
            load(checkpoint, numbers)

    found: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(repeats):
        for name, function in (("without", plain), ("with", compared)):
            if forget:
                drop_from_page_cache(checkpoint)
            start = time.perf_counter()
            function()
            found[name].append(time.perf_counter() - start)
    without, both = (statistics.median(found[name]) for name in ("without", "with"))
    print(
        f"load from the {place}: {without:.2f} s without, {both:.2f} s with verification "
        f"({100 * (both / without - 1):+.1f} %)"
    )


def load(checkpoint: Path, numbers: int) -> None:
    """Read all weights into new tensors, as a run does."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    wanted = {
        str(layer): ShardedTensor.from_rank_offsets(
            "decoder.layers.weight",
            torch.empty(numbers),
            (0, layer, LAYERS),
            prepend_axis_num=1,
        )
        for layer in range(LAYERS)
    }
    dist_checkpointing.load(wanted, str(checkpoint))


def drop_from_page_cache(checkpoint: Path) -> None:
    """Let the next reading come from the disk."""
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median(function: Callable[[], object], repeats: int) -> float:
    """Return the median of a function's seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
