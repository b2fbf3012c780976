"""Every field of megatron-core's sections is classified, and what is rejected says why."""

import re
from pathlib import Path

import pytest

from bridge.training.config.fields import fields_of
from settings_audit import CLASSES, classified, rejection, sections
from settings_cases import trial_of

README = Path(__file__).resolve().parents[2] / "packages" / "bridge-state" / "README.md"


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    """Return the class of each field in the README's table."""
    rows = list(classified(README.read_text()))
    found = {f"{section}.{name}": kind for section, kind, name in rows}
    assert len(found) == len(rows)
    return found


def test_every_field_is_in_the_table_with_a_class(table: dict[str, str]) -> None:
    fields = {f"{section}.{name}" for section, it in sections().items() for name in fields_of(it)}
    assert fields == table.keys(), "run tools/settings_audit.py --write"
    assert set(table.values()) <= set(CLASSES)


@pytest.mark.parametrize("section", ["model", "optimizer", "ddp"])
def test_the_dry_run_rejects_what_the_table_says_by_field_and_reason(
    section: str, table: dict[str, str]
) -> None:
    holder = sections()[section]
    for name in fields_of(holder):
        path, trial = f"{section}.{name}", trial_of(section, name, holder)
        if trial is None:
            continue
        problems = rejection(trial, f"{path}={trial.value}")
        if any("emerging-optimizers" in line for line in (problems or "").splitlines()):
            continue  # tried where the package is
        assert (problems is not None) == (table[path] != "effect"), (path, problems)
        for line in (problems or "").splitlines():
            # Of megatron-core's own texts too.
            assert re.match(rf"{section}\.\w+|\d+ ranks|[a-z]+\.\w+", line), line
            assert not re.search(r" --\w|\w+Error\b", line), line
