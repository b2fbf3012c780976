"""Every field of megatron-core's sections is classified, and what is rejected says why."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from settings_audit import CLASSES, classified, rejection, sections
from settings_cases import Trial, audited_fields, trial_of

README = Path(__file__).resolve().parents[2] / "packages" / "bridge-state" / "README.md"


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    """Return the class of each field in the README's table."""
    rows = list(classified(README.read_text()))
    found = {f"{section}.{name}": kind for section, kind, name in rows}
    assert len(found) == len(rows)
    return found


def test_every_field_is_in_the_table_with_a_class(table: dict[str, str]) -> None:
    fields = {
        f"{section}.{name}"
        for section, holder in sections().items()
        for name in audited_fields(section, holder)
    }
    of_gpt = {path for path in table if not path.startswith("model.language.")}
    assert fields == of_gpt, "run tools/settings_audit.py --write"
    assert set(table.values()) <= set(CLASSES)


@pytest.mark.parametrize("section", ["model", "optimizer", "ddp"])
def test_the_dry_run_rejects_what_the_table_says_by_field_and_reason(
    section: str, table: dict[str, str]
) -> None:
    holder = sections()[section]
    together: dict[Trial, list[str]] = {}
    for name in audited_fields(section, holder):
        path, trial = f"{section}.{name}", trial_of(section, name, holder)
        if trial is not None and table[path] != "effect":
            # What a GPU alone has may be what others need, so it is tried by itself.
            run = replace(trial, value="" if table[path] != "GPU only" else path)
            together.setdefault(run, []).append(f"{path}={trial.value}")
    assert len(together) < len(table)
    for run, overrides in together.items():
        problems = (rejection(run, *overrides) or "").splitlines()
        for line in problems:
            # Of megatron-core's own texts too.
            assert re.match(r"[a-z]+(\.\w+)+|\d+ ranks", line), line
            assert not re.search(r" --\w|Error\b", line), line
        for override in overrides:
            path = override.partition("=")[0]
            told = re.compile(rf"{re.escape(path)}(?![\w.])")
            # megatron-core stops at the first of its own errors.
            alone = told.search("\n".join(problems)) or rejection(run, override)
            assert alone, path
