"""One rank of ``bridge pretrain --nproc`` on GPUs: started by the launcher, not by hand."""

import sys
from pathlib import Path

from bridge.cli.launch import Launcher, train_as_rank
from bridge.cli.recipes import find_recipe

if __name__ == "__main__":
    launcher, name, path = sys.argv[1:]
    # Imported after the environment is as the launcher made it.
    from bridge.training.config import ConfigContainer

    parent = Launcher(int(launcher), Path(path).parent)
    config = ConfigContainer.from_yaml(Path(path).read_text())
    sys.exit(train_as_rank(parent, find_recipe(name), config))
