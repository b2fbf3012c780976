"""Set every field of the model, optimizer and ddp sections to another value, and see what changes.

Each trial of tests/support/settings_trials.py is a run of a tiny GPT on the CPU, compared with the
same run without the value: losses, gradient norms, metrics, modules and parameters, the optimizer's
groups and scaler, the operations of a step (collectives too), hooks, files and messages. A field
has an effect, follows from others, is rejected in the dry run, or acts on a GPU alone; else the
audit fails. With each boolean of optimizer and ddp the loss must fall as without it.

The table is in bridge-state's README; `--write` replaces it. Muon, Lion and SOAP are
tried where emerging-optimizers is installed.

    uv run --with emerging-optimizers tools/settings_audit.py --write
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from campaign import ROOT, Campaign

TEST = "tests/end_to_end/test_settings_table.py::test_a_field_is_of_the_class_that_its_trial_shows"
README = ROOT / "packages" / "bridge-state" / "README.md"
START, END = "<!-- settings: written by tools/settings_audit.py -->", "<!-- settings: end -->"
CLASSES = ("effect", "derived", "rejected", "GPU only")


@dataclass(frozen=True)
class Finding:
    """The class of a field, and what shows it."""

    kind: str
    shown: str


def table(findings: Mapping[str, Finding]) -> str:
    """Return the findings as a table, a row for the fields of a section with the same finding."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for path, found in findings.items():
        section, _, name = path.rpartition(".")
        rows.setdefault((section, found.kind, found.shown), []).append(name)
    order = {kind: index for index, kind in enumerate((*CLASSES, "?"))}
    lines = ["| section | class | shown by, or why | fields |", "|---|---|---|---|"]
    for section, kind, shown in sorted(rows, key=lambda key: (key[0], order[key[1]], key[2])):
        names = ", ".join(f"`{name}`" for name in rows[section, kind, shown])
        lines.append(f"| {section} | {kind} | {shown} | {names} |".replace("| |", "|  |"))
    return "\n".join(lines)


def findings_in(output: str) -> dict[str, Finding]:
    """Return the findings that an earlier audit printed."""
    lines = (line.split(": ", 2) for line in output.splitlines() if not line.startswith("|"))
    return {
        line[0]: Finding(line[1], line[2])
        for line in lines
        if len(line) == len(("path", "class", "shown")) and line[1] in CLASSES
    }


def main() -> int:
    """Audit the fields that match, print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="audit only fields that match")
    parser.add_argument("--known", type=Path, help="output of an audit that was cut off")
    parser.add_argument("--write", action="store_true", help="write the table into the README")
    options = parser.parse_args()
    known = {} if options.known is None else findings_in(options.known.read_text())
    campaign = Campaign(
        name="settings",
        test=TEST,
        options={
            "pattern": options.pattern,
            "known": {path: [found.kind, found.shown] for path, found in known.items()},
        },
    )
    findings: dict[str, Finding] = {}
    problems: list[str] = []
    for result in campaign:
        path, found = result["path"], Finding(result["kind"], result["shown"])
        print(f"{path}: {found.kind}: {found.shown}", flush=True)
        problems += result["problems"]
        # A language model's section has rows of its own where it differs from a GPT's.
        of_gpt = findings.get(path.replace("model.language.", "model.", 1))
        if of_gpt is None or of_gpt.kind != found.kind:
            findings[path] = found
    print(table(findings))
    print(*problems, sep="\n", file=sys.stderr)
    if options.write and not options.pattern and not campaign.has_failed:
        text = README.read_text()
        before, after = text.partition(START)[0], text.partition(END)[2]
        README.write_text(f"{before}{START}\n{table(findings)}\n{END}{after}")
    return campaign.has_failed


if __name__ == "__main__":
    sys.exit(main())
