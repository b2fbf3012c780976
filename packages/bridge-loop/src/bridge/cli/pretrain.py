"""``bridge pretrain``: train a recipe, on this process's rank or on several local ones."""

import argparse

from bridge.cli.runs import training


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = training.add_parser(commands, "pretrain", "train a recipe")
    parser.set_defaults(run=lambda options: training.run(options, "pretrain"))
