"""One rank of ``--nproc`` on GPUs: started by the launcher, not by hand."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bridge.cli.runs.local_rank import Launcher, train_as_rank
from bridge.cli.runs.start_command import StartCommand
from bridge.training.recipe_lookup import find_recipe

if TYPE_CHECKING:
    from bridge.cli.runs.one_rank import Command

if __name__ == "__main__":
    launcher, command, name, path, nproc, *words = sys.argv[1:]
    # Imported after the environment is as the launcher made it.
    from bridge.training.config import ConfigContainer
    from bridge.training.config.schema.import_limits import trust_files

    start = StartCommand(tuple(words), int(nproc))
    parent = Launcher(int(launcher), Path(path).parent, start)
    with trust_files():
        config = ConfigContainer.from_yaml(Path(path).read_text())
    sys.exit(train_as_rank(parent, cast("Command", command), find_recipe(name), config))
