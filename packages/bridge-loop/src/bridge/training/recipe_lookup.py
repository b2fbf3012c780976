"""The recipe of a command: found by name and configured, also for other packages' commands.

Heavy modules are imported where they are needed, as the command starts with this one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.training.entry_points import RECIPES
from bridge.training.file_kinds import head_of, kind_of
from bridge.training.local_paths import PathOption
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer, YamlDocument, YamlText
    from bridge.training.contracts import Recipe


def add_configuration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that a configuration is made of: recipe, files, overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="one of `bridge recipes`")
    parser.add_argument(
        "overrides", metavar="section.field=value", nargs="*", help="values that replace others"
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        action=PathOption,
        default=[],
        help="values that replace the recipe's, section by section, such as the config.yaml of a "
        "run (but for its checkpoint.run_dir); may be given again",
    )


def find_recipe(name: str) -> "Recipe":
    """Return the recipe that an installed package offers under `name`.

    Raises:
        UsageError: There is none; the message lists the recipes, or the package to install.
    """
    try:
        recipe: Recipe = RECIPES.find(name)
    except UsageError as error:
        raise UsageError(f"recipe: {error}") from error
    return recipe


def read_documents(paths: Sequence[str]) -> "list[YamlText]":
    """Return the text of configuration files, each with its path as its name.

    A run's own config.yaml gives everything but the run's directory.

    Raises:
        UsageError: A file cannot be read.
    """
    from bridge.training.config import YamlText

    texts = []
    for path in paths:
        try:
            document = YamlText(text=Path(path).read_text(), source=path)
        except OSError as error:
            raise UsageError(f"--config: cannot read {path!r} ({error}); check the path") from error
        except UnicodeDecodeError as error:
            what = kind_of(head_of(Path(path))) or f"not text ({error})"
            raise UsageError(f"--config={path!r}: is {what}; give a file of YAML") from error
        texts.append(document.of_a_new_run())
    return texts


def configure(
    recipe: "Recipe",
    documents: "Sequence[YamlDocument]",
    overrides: Sequence[str],
    *,
    world_size: int,
) -> "ConfigContainer":
    """Return the recipe's configuration with the values of files and then overrides, resolved.

    Raises:
        ConfigError: With every problem of files, overrides and the result.
    """
    from bridge.training.config import configure as merge_and_resolve
    from bridge.training.ranks.groups import choose_device

    return merge_and_resolve(
        recipe(),
        overrides,
        yaml_documents=documents,
        device=lambda config: choose_device(config.dist.device),
        world_size=world_size,
    )


def checked_ranks(nproc: int | None) -> int:
    """Return the number of ranks that ``--nproc`` asks for; 1 where it is not given.

    Raises:
        UsageError: It is less than 1.
    """
    if nproc is not None and nproc < 1:
        raise UsageError(f"--nproc: {nproc} ranks cannot train; give 1 or more")
    return 1 if nproc is None else nproc
