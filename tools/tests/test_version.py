"""One version for all members, and exact pins between them."""

import shutil
from pathlib import Path

import pytest

from version import differences, member_pyprojects, version_of, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path in [ROOT / "pyproject.toml", *member_pyprojects(ROOT)]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tmp_path


def test_every_member_and_every_pin_has_the_roots_version() -> None:
    assert list(differences(ROOT)) == []


def test_a_member_or_a_pin_of_another_version_is_reported(tree: Path) -> None:
    loop = tree / "packages" / "bridge-loop" / "pyproject.toml"
    version = version_of(tree)
    text = loop.read_text().replace(f'version = "{version}"', 'version = "9.9"')
    loop.write_text(text.replace(f"bridge-state[tensorboard]=={version}", "bridge-state>=0"))
    assert list(differences(tree)) == [
        f"packages/bridge-loop/pyproject.toml: version is 9.9, the root's is {version}",
        f"packages/bridge-loop/pyproject.toml: 'bridge-state>=0' must end in '=={version}'",
    ]


def test_set_writes_the_version_everywhere_and_touches_no_other_pin(tree: Path) -> None:
    before = (tree / "packages" / "bridge-loop" / "pyproject.toml").read_text()
    write(tree, "1.2.0rc1")
    after = (tree / "packages" / "bridge-loop" / "pyproject.toml").read_text()
    assert list(differences(tree)) == []
    assert version_of(tree) == "1.2.0rc1"
    assert '"bridge-state[tensorboard]==1.2.0rc1"' in after
    assert after == before.replace(version_of(ROOT), "1.2.0rc1")


def test_a_version_that_no_installer_reads_is_rejected(tree: Path) -> None:
    with pytest.raises(SystemExit, match="'v1'"):
        write(tree, "v1")
