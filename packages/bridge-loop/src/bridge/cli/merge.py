"""``bridge merge``: one model of adapters and their base model."""

import argparse
import os
from pathlib import Path

from bridge.training.local_paths import PathOption


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "merge",
        help="fold trained adapters into the model's weights",
        description="Write a checkpoint of the merged model from a run that trained adapters.",
    )
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", action=PathOption, help="with the adapters"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        action=PathOption,
        help="a new folder; never overwritten",
    )
    parser.add_argument(
        "--base",
        metavar="RUN_OR_CHECKPOINT",
        action=PathOption,
        help="the base model of the adapters, if it was moved",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; return its exit code.

    Raises:
        UsageError: There are no adapters, the base model is missing or another one, or the output
            exists.
    """
    # Merging is done on the CPU: hide the GPUs before torch looks for them.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from bridge.training.checkpoint_weights import saved_config
    from bridge.training.merging import merge
    from bridge.training.run_files.directory import find_checkpoint
    from bridge.training.run_files.output_folder import new_folder

    checkpoint = find_checkpoint(options.checkpoint, "RUN_OR_CHECKPOINT")
    config = saved_config(checkpoint)
    output = Path(options.output)
    with new_folder(output, "--output") as folder:
        parameters = merge(checkpoint, config, folder, options.base)
    print(f"wrote {output}: a checkpoint of {parameters:,} parameters")
    return 0
