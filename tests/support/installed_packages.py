"""Packages with entry points, installed for the time of a test."""

from pathlib import Path

import pytest


def install(place: Path, name: str, entry_points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package in `place` importable, as pip would install it.

    Args:
        place: A folder, with or without the package's modules.
        name: The distribution's name.
        entry_points: The content of its entry_points.txt.
        monkeypatch: Removes the folder from the path afterwards.
    """
    metadata = place / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(str(place))
