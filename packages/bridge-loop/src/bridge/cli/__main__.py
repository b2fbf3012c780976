"""``python -m bridge.cli``: the bridge command where no script is installed."""

import sys

from bridge.cli import main

if __name__ == "__main__":
    sys.exit(main())
