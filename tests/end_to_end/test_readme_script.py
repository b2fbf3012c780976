"""The script of one's own in the README trains as it stands there, on one rank and on two."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from ranks import run_ranks
from training_runs import series

README = Path(__file__).parents[2] / "README.md"


def test_the_script_in_the_readme_trains_to_the_same_losses_on_one_rank_and_on_two(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(# own_model\.py\n.*?)^```$", README.read_text(), re.M | re.S)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 40
    (tmp_path / "own_model.py").write_text(blocks[0])

    def as_torchrun_starts_it(name: str) -> None:
        sys.argv = ["own_model.py", str(tmp_path / name)]
        runpy.run_path(str(tmp_path / "own_model.py"), run_name="__main__")

    # The ranks are forked, which spares the imports.
    run_ranks(1, as_torchrun_starts_it, "alone", process_group=False)
    said = capfd.readouterr()
    assert re.search(r"^loss [\d.]+ after 40 steps$", said.out, re.M)
    assert "Warning" not in said.err
    run_ranks(2, as_torchrun_starts_it, "both", process_group=False)
    alone, both = (series(tmp_path / name, "loss") for name in ("alone", "both"))
    assert len(alone) == 10
    assert alone[-1] < alone[0]
    assert both == pytest.approx(alone, rel=1e-5)
