"""``bridge export``: a checkpoint in another format; packages bring the targets."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.training.entry_points import EXPORTERS
from bridge.training.local_paths import PathOption
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.contracts import Exporter

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint in another format",
        description="Write a checkpoint in another format, such as Hugging Face's (--to hf).",
    )
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", action=PathOption, help="saved under any layout"
    )
    parser.add_argument("--to", required=True, metavar="TARGET", help="the format, such as hf")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        action=PathOption,
        help="a new folder; never overwritten",
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="type of the weights (default: that of the checkpoint)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; return its exit code.

    Raises:
        UsageError: There is no such target or checkpoint, the target does not support the model,
            or the output exists.
    """
    exporter = find_exporter(options.to)
    size = parse_size(options.max_shard_size)

    from bridge.training.checkpoint.verification import verified
    from bridge.training.checkpoint_weights import saved_config
    from bridge.training.config.schema.importable_names import dtype_from_name
    from bridge.training.contracts import ExportRequest
    from bridge.training.run_files.directory import find_checkpoint
    from bridge.training.run_files.output_folder import new_folder

    checkpoint = find_checkpoint(options.checkpoint, "RUN_OR_CHECKPOINT")
    config = saved_config(checkpoint)
    output = Path(options.output)
    with new_folder(output, "--output") as folder, verified(checkpoint):
        line = exporter(
            ExportRequest(
                checkpoint=checkpoint,
                config=config,
                output=folder,
                dtype=None if options.dtype is None else dtype_from_name(options.dtype),
                max_shard_size=size,
            )
        )
    print(f"wrote {output}: {line}")
    return 0


def find_exporter(target: str) -> "Exporter":
    """Return the function that an installed package offers for a target.

    Raises:
        UsageError: There is none; the message lists the targets, or a package to install.
    """
    try:
        exporter: Exporter = EXPORTERS.find(target)
    except UsageError as error:
        raise UsageError(f"--to: {error}") from error
    return exporter


def parse_size(text: str) -> int:
    """Return the number of bytes that a text such as 5GB or 200MB means.

    Raises:
        UsageError: It means none, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size: {text!r} is no size; give one such as 5GB or 200MB")
    return size
