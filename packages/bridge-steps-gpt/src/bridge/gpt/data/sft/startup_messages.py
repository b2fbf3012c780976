"""Startup messages about the data: notes and warnings."""

from collections.abc import Mapping, Sequence
from typing import Any

from bridge.gpt.data.sft.corpus import Corpus


def collect_notes(corpora: Mapping[str, Corpus], sequences: Mapping[str, int]) -> dict[str, Any]:
    """Return the numbers of samples, of rows that were cut or dropped, and of tokens that count.

    Args:
        corpora: The samples of each split.
        sequences: The number of packed sequences of each split; empty without packing.
    """
    notes: dict[str, Any] = {}
    for name, corpus in corpora.items():
        report = corpus.report
        notes[f"{name} rows"] = report.samples
        if name in sequences:
            notes[f"packed {name} sequences"] = sequences[name]
        fates = {
            f"{name} rows cut to model.seq_length": report.cut,
            f"{name} rows dropped as too long": report.dropped_too_long,
            f"{name} rows dropped as no answer was left": report.dropped_without_answer,
        }
        notes |= {fate: rows for fate, rows in fates.items() if rows}
        for key, rows in report.ignored_keys.items():
            notes[f"{name} rows of which {key!r} is ignored"] = rows
        notes[f"% of {name} tokens count in the loss"] = counted_percentage(corpus)
    return notes


def collect_warnings(corpora: Mapping[str, Corpus], ignore_keys: Sequence[str] = ()) -> list[str]:
    """Return the warnings about special tokens in the text, the loss mask and `ignore_keys`.

    A loss mask in which nothing or everything counts, and an ignored key that no row has, are
    probably mistakes.
    """
    found = {key for corpus in corpora.values() for key in corpus.report.ignored_keys}
    lines = [
        f"warning: dataset.ignore_keys: {key!r} has no effect: no row or turn has it, or it is read"
        for key in ignore_keys
        if key not in found
    ]
    for name, corpus in corpora.items():
        if written := corpus.report.with_special_tokens:
            lines.append(
                f"warning: {written} {name} row{'s have' if written > 1 else ' has'} special "
                f"tokens written in {'their' if written > 1 else 'its'} text; they are encoded as "
                "text"
            )
        share = counted_percentage(corpus)
        if share in (0, 100):
            what = "hardly any token" if share == 0 else "every token, also those of prompts,"
            lines.append(
                f"warning: {what} of the {name} data counts in the loss ({share:g} %); compare "
                "dataset.loss_on with what `bridge show-batch` shows"
            )
    return lines


def counted_percentage(corpus: Corpus) -> float:
    """Return the share of predicted tokens that count in the loss, in percent with one decimal."""
    return round(100 * corpus.report.counted / corpus.report.tokens, 1)
