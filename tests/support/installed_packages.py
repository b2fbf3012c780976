"""Packages with entry points, there for the time of a test."""

from pathlib import Path

import pytest


def install(place: Path, name: str, entry_points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python find a package in `place` as pip would have installed it.

    Args:
        place: A folder, with the package's modules or without.
        name: The distribution's name.
        entry_points: What stands in its entry_points.txt.
        monkeypatch: Takes the folder from the path again.
    """
    metadata = place / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(str(place))
