"""The script of one's own in the README trains as it stands there, on one rank and on two."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import run_ranks
from training_runs import series

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_script_in_the_readme_trains_to_the_same_losses_on_one_rank_and_on_two(
    tmp_path: Path,
) -> None:
    blocks = re.findall(r"^```python\n(# own_model\.py\n.*?)^```$", README.read_text(), re.M | re.S)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 40
    (tmp_path / "own_model.py").write_text(blocks[0])
    ended = subprocess.run(
        [sys.executable, "own_model.py", "alone"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^loss [\d.]+ after 40 steps$", ended.stdout, re.M)
    assert "Warning" not in ended.stderr

    def as_torchrun_starts_it() -> None:
        sys.argv = ["own_model.py", str(tmp_path / "both")]
        runpy.run_path(str(tmp_path / "own_model.py"), run_name="__main__")

    # The ranks are forked, which spares the imports.
    run_ranks(2, as_torchrun_starts_it, process_group=False)
    alone, both = (series(tmp_path / name, "loss") for name in ("alone", "both"))
    assert len(alone) == 10
    assert alone[-1] < alone[0]
    assert both == pytest.approx(alone, rel=1e-5)
