import sys
from pathlib import Path

import pytest

from bridge.training.entry_points import EntryPointGroup
from installed_packages import install

COLORS = EntryPointGroup("bridge.colors", "colors", "bridge-paint")


@pytest.fixture
def paint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package that offers two colors, one of which cannot be imported."""
    (tmp_path / "paint.py").write_text("RED = 'ff0000'\n")
    offers = "[bridge.colors]\nred = paint:RED\ngreen = no_such_paint:GREEN\n"
    install(tmp_path, "paint", offers, monkeypatch)


@pytest.mark.usefixtures("paint")
def test_what_is_offered_is_listed_and_found_by_name_and_the_rest_not_imported() -> None:
    assert list(COLORS.entries()) == ["green", "red"]
    assert "paint" not in sys.modules
    assert COLORS.find("red") == "ff0000"


@pytest.mark.usefixtures("paint")
def test_another_name_is_refused_with_the_nearest_and_all() -> None:
    expected = r"^there is no 'rad'; did you mean 'red'\? \(there are green, red\)$"
    with pytest.raises(ValueError, match=expected):
        COLORS.find("rad")
    with pytest.raises(ValueError, match=r"^there is no 'xyz' \(there are green, red\)$"):
        COLORS.find("xyz")


@pytest.mark.usefixtures("paint")
def test_an_offer_that_cannot_be_imported_is_no_missing_one() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_paint"):
        COLORS.find("green")


def test_where_nothing_is_offered_the_installation_is_named() -> None:
    with pytest.raises(
        ValueError,
        match="'red' is not there, as no package with colors is installed; install one, such as "
        "bridge-paint \\(pip install --find-links DIST bridge-paint",
    ):
        COLORS.find("red")
