"""Every field of megatron-core's sections has the class that bridge-state's README gives it.

tools/settings_audit.py tries all fields and writes the table.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from campaigns import hand_back, options_of
from settings_effects import CLASSES, LANGUAGE, Audit, Finding, multimodal, rejection, sections
from settings_trials import Trial, audited_fields, trial_of

README = Path(__file__).resolve().parents[2] / "packages" / "bridge-state" / "README.md"


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    """Return the class of each field in the README's table."""
    text = README.read_text().partition("<!-- settings: written by")[2]
    found: dict[str, str] = {}
    for line in text.partition("<!-- settings: end -->")[0].strip().splitlines()[3:]:
        section, kind, _, names = (cell.strip() for cell in line.strip("|").split(" | "))
        for name in re.findall(r"`(\w+)`", names):
            assert f"{section}.{name}" not in found
            found[f"{section}.{name}"] = kind
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


ASKED = options_of("settings")
"""The options of tools/settings_audit.py; None in the suite."""
IN_THE_SUITE = [
    "model.language.ffn_hidden_size",
    "optimizer.fp8_recipe",
    "optimizer.decoupled_min_lr",
]


def paths() -> list[str]:
    """Return the fields to try, those of a language model's section after those of a GPT's."""
    return IN_THE_SUITE if ASKED is None else list(_paths_that_match(ASKED["pattern"]))


def _paths_that_match(pattern: str) -> Iterator[str]:
    language: Any = multimodal("fp32").model
    holders = [(section, section, holder) for section, holder in sections().items()]
    for path, section, holder in [*holders, (LANGUAGE, "model", language.language)]:
        for name in audited_fields(section, holder):
            if re.search(pattern, f"{path}.{name}"):
                yield f"{path}.{name}"


@pytest.fixture(scope="module")
def audit() -> Audit:
    return Audit()


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    """Return the findings so far, at first those of an earlier audit."""
    known = {} if ASKED is None else ASKED["known"]
    return {path: Finding(*found) for path, found in known.items()}


@pytest.mark.parametrize("path", paths())
def test_a_field_is_of_the_class_that_its_trial_shows(
    path: str, audit: Audit, findings: dict[str, Finding], table: dict[str, str]
) -> None:
    audit.problems.clear()
    if path not in findings:
        section, _, name = path.rpartition(".")
        if section == LANGUAGE:
            language: Any = multimodal("fp32").model
            found = audit.language(name, language.language, findings.get(f"model.{name}"))
        else:
            found = audit.field(section, name, sections()[section])
        findings[path] = found
    found = findings[path]
    hand_back(path=path, kind=found.kind, shown=found.shown, problems=audit.problems)
    assert audit.problems == []
    if ASKED is None:
        # The table has a row for a language model's section only where it differs from a GPT's.
        assert found.kind == (table.get(path) or table[path.replace(LANGUAGE, "model")])


@pytest.mark.parametrize("section", ["model", "optimizer", "ddp"])
def test_the_dry_run_rejects_what_the_table_says_by_field_and_reason(
    section: str, table: dict[str, str]
) -> None:
    holder = sections()[section]
    together: dict[Trial, list[str]] = {}
    for name in audited_fields(section, holder):
        path, trial = f"{section}.{name}", trial_of(section, name, holder)
        if trial is not None and table[path] != "effect":
            # A feature of a GPU alone may be needed by others, so it is tried by itself.
            run = replace(trial, value="" if table[path] != "GPU only" else path)
            together.setdefault(run, []).append(f"{path}={trial.value}")
    assert len(together) < len(table)
    for run, overrides in together.items():
        problems = (rejection(run, *overrides) or "").splitlines()
        for line in problems:
            # This holds for megatron-core's own messages too.
            assert re.match(r"[a-z]+(\.\w+)+|\d+ ranks", line), line
            assert not re.search(r" --\w|Error\b", line), line
        for override in overrides:
            path = override.partition("=")[0]
            pattern = re.compile(rf"{re.escape(path)}(?![\w.])")
            # megatron-core stops at the first of its own errors.
            alone = pattern.search("\n".join(problems)) or rejection(run, override)
            assert alone, path
