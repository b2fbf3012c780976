"""``bridge finetune``: train a recipe from the weights of a run or a checkpoint."""

import argparse

from bridge.cli.runs import training
from bridge.training.local_paths import PathOption
from bridge.training.usage_error import UsageError


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = training.add_parser(commands, "finetune", "train a recipe from a checkpoint")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="RUN_OR_CHECKPOINT",
        action=PathOption,
        help="the run or checkpoint whose model is fine-tuned; its tokenizer comes with it",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.resume and options.source is not None:
        raise UsageError(
            "--from: a resumed run continues from its own checkpoint; leave --from out, or start a "
            "new run without --resume"
        )
    if not options.resume and options.source is None:
        raise UsageError(
            "--from: fine-tuning needs weights to start from; give a run's directory or one of its "
            "checkpoints"
        )
    return training.run(options, "finetune", source=options.source)
