"""The command that continues a run starts with the words of the command that started it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_BRIDGE = """
import sys
from bridge.cli.runs.start_command import StartCommand
print(StartCommand.of_this_process(sys.argv[1:], None).words)
"""
_STARTER = """
import subprocess
import sys
*_, program, first, second = sys.argv
sys.exit(subprocess.run([program, first, second]).returncode)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs: the command, and two that start it as uv and torchrun do."""
    for name, text in (("bridge", _BRIDGE), ("uv", _STARTER), ("torchrun", _STARTER)):
        (tmp_path / name).write_text(f"#!{sys.executable}\n{text}")
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bridge", ("bridge",)),
        ("./bridge", ("./bridge",)),
        ("nice uv run --frozen bridge", ("uv", "run", "--frozen", "bridge")),
        ("uv run torchrun -m bridge", ("uv", "run", "torchrun", "-m", "bridge")),
    ],
)
def test_the_words_before_the_commands_own_arguments_are_those_of_the_start(
    programs: Path, line: str, words: tuple[str, ...]
) -> None:
    folders = [] if line.startswith("./") else [str(programs)]
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    process = subprocess.run(
        [*line.split(), "pretrain", "a recipe"],
        cwd=programs,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == f"{words}\n"
