"""``bridge recipes`` lists the recipes; ``bridge show`` prints a resolved configuration."""

import argparse
import sys

from bridge.cli.output import layout_lines
from bridge.cli.runs.hidden_gpus import hide_gpus_on_cpu_runs
from bridge.training.entry_points import RECIPES
from bridge.training.recipe_lookup import (
    add_configuration_arguments,
    checked_ranks,
    configure,
    find_recipe,
    read_documents,
)


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    listing = commands.add_parser("recipes", help="list the recipes that are installed")
    listing.set_defaults(run=_list)
    show = commands.add_parser("show", help="print a recipe's resolved configuration")
    add_configuration_arguments(show)
    show.add_argument("--nproc", type=int, metavar="N", help="resolve for N ranks")
    show.add_argument(
        "--full", action="store_true", help="megatron-core's fields too that hold their default"
    )
    show.set_defaults(run=_show)


def _list(options: argparse.Namespace) -> int:
    found, broken = RECIPES.usable(lambda recipe: recipe.summary)
    for name, summary in found.items():
        print(f"{name:<16}{summary}")
    for line in broken.values():
        print(f"bridge: {line}", file=sys.stderr)
    if not found and not broken:
        print("no package with recipes is installed (bridge-steps-gpt brings some)")
    return 0


def _show(options: argparse.Namespace) -> int:
    documents = read_documents(options.config)
    hide_gpus_on_cpu_runs([document.text for document in documents], options.overrides)
    ranks = checked_ranks(options.nproc)
    config = configure(find_recipe(options.recipe), documents, options.overrides, world_size=ranks)
    # As a comment, so that the output is a valid file.
    sys.stdout.writelines(f"# {line}\n" for line in layout_lines(config, ranks))
    sys.stdout.write(config.to_yaml(brief=not options.full))
    return 0
