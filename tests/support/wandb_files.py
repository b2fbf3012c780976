"""Readers of the files that W&B writes offline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def read_wandb(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Read the records of each start of the run with wandb's own reader, oldest start first."""
    starts = []
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        result = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        starts.append([json.loads(line) for line in result.stdout.splitlines()])
    return starts


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that were logged, of the records of one start."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]
