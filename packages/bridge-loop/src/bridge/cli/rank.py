"""One rank of ``bridge pretrain --nproc`` on GPUs: started by the launcher, not by hand."""

import sys
from pathlib import Path

from bridge.cli.launch import train_as_rank
from bridge.cli.recipes import configure, find_recipe

if __name__ == "__main__":
    name, path = sys.argv[1:]
    recipe = find_recipe(name)
    sys.exit(train_as_rank(recipe, configure(recipe, [Path(path).read_text()], [])))
