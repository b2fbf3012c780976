"""The script of one's own in the README trains as it stands there, on one rank and on two."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_script_in_the_readme_trains_to_the_same_losses_on_one_rank_and_on_two(
    tmp_path: Path,
) -> None:
    blocks = re.findall(r"^```python\n(# own_model\.py\n.*?)^```$", README.read_text(), re.M | re.S)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 40
    (tmp_path / "own_model.py").write_text(blocks[0])
    alone = _run(tmp_path, [sys.executable, "own_model.py", "alone"])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    both = _run(tmp_path, [*torchrun, "own_model.py", "both"])
    assert len(alone) == 10
    assert alone[-1] < alone[0]
    assert both == pytest.approx(alone, rel=1e-5)


def _run(folder: Path, command: list[str]) -> list[float]:
    ended = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr
    # Two ranks may print into one line.
    assert re.search(r"\bloss [\d.]+ after 40 steps", ended.stdout)
    assert "Warning" not in ended.stderr
    lines = (folder / command[-1] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
