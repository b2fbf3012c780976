"""The command `bridge import-hf`: makes a checkpoint of a model in Hugging Face's format."""

import argparse
import sys
from pathlib import Path

from bridge.training.local_paths import PathOption


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``import-hf`` to the `bridge` command; an entry point of ``bridge.commands``."""
    parser = commands.add_parser(
        "import-hf",
        help="make a checkpoint of a Hugging Face model",
        description="Make a checkpoint of a Llama or Qwen3 model in Hugging Face's format, which "
        "runs under any parallel layout start from.",
    )
    parser.add_argument(
        "directory", metavar="DIR", action=PathOption, help="with config.json and *.safetensors"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="CHECKPOINT",
        action=PathOption,
        help="a new folder; never overwritten",
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="type of the weights (default: that of the files)",
    )
    parser.set_defaults(run=run_import)


def run_import(options: argparse.Namespace) -> int:
    """Run ``bridge import-hf`` and return the exit code.

    Raises:
        UsageError: The model is not supported, its files are incomplete, or the output exists.
    """
    # These import torch and megatron-core, which other commands should not wait for.
    from bridge.gpt.conversion.hf_import import import_hf
    from bridge.training.config.schema.importable_names import dtype_from_name

    dtype = None if options.dtype is None else dtype_from_name(options.dtype)
    line = import_hf(Path(options.directory), Path(options.output), dtype=dtype)
    sys.stdout.write(f"{line}\n")
    return 0
