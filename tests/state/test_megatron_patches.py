"""Another version of megatron-core is rejected before anything of it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.training.megatron_patches import MEGATRON_CORE, check_megatron_core


def test_the_installed_version_is_the_one_that_is_supported() -> None:
    check_megatron_core()


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ('MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = ""\n', "0.20.0"),
        ("MAJOR = 0\nMINOR = 19\nPATCH = 2\nPRE_RELEASE = 'rc1'\n", "0.19.2rc1"),
        ("__version__ = '1.0'\n", "unknown"),
    ],
)
def test_another_version_is_rejected_with_what_to_install(
    tmp_path: Path, info: str, found: str
) -> None:
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('a private name is gone')\n")
    (package / "package_info.py").write_text(info)
    started = subprocess.run(
        [sys.executable, "-c", "import bridge.training.config"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert started.stderr.splitlines()[-1] == (
        f"bridge.training.usage_error.UsageError: megatron-core={found}: Bridge uses private names "
        f"of version {MEGATRON_CORE} and is tested with it alone; "
        f"pip install megatron-core=={MEGATRON_CORE}"
    )
