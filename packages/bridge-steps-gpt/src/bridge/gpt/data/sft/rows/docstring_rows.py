"""Rows from the docstrings of the running Python's standard library, on any machine.

The prompt is a function's signature. The answer is the first paragraph of its docstring, in one
line. The rows for validation are from the modules that gpt-tiny, which is trained on the same
sources, keeps for its own validation, so that neither run has seen them. Rows of validation that
are equal to one of training are removed.
"""

import ast
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from bridge.gpt.data.sft.rows.conversations import ASSISTANT, Conversation, Turn
from bridge.gpt.data.text.documents import count_documents
from bridge.gpt.data.text.sources import TextFile, python_standard_library

_TRAINED_ON = 0.98
"""Share of the documents that gpt-tiny is trained on.

`bridge.gpt.data.pretraining.split_plan.default_split` keeps two percent of a text of this size for
validation.
"""


@dataclass(frozen=True, kw_only=True)
class DocstringRows:
    """The rows of one split (see `bridge.gpt.data.sft.rows.row_files.RowSource`)."""

    split: Literal["train", "validation"]

    def files(self) -> list[Path]:
        """Return the source files of the library."""
        return [file.path for file in _library()]

    def check(self) -> dict[str, int]:
        """Return no counts, since these rows have no extra keys."""
        return {}

    def conversations(self) -> Iterator[Conversation]:
        """Yield a prompt and its answer for each function that has a docstring, without repeats."""
        yield from _rows_of_library()[self.split]


def held_out_modules(files: Sequence[TextFile]) -> list[TextFile]:
    """Return the library's files that gpt-tiny is not trained on, not even in part, in order."""
    documents = count_documents(files)
    first = round(_TRAINED_ON * sum(documents))
    start = 0
    for number, count in enumerate(documents):
        if start >= first:
            return list(files[number:])
        start += count
    return []


def instructions(source: bytes) -> Iterator[tuple[int, str, str]]:
    """Yield line, prompt and answer for each function of a module that has a docstring."""
    with warnings.catch_warnings():
        # Some modules have invalid escapes in their strings.
        warnings.simplefilter("ignore")
        module = ast.parse(source)
    for node in _functions(module):
        docstring = ast.get_docstring(node)
        summary = " ".join((docstring or "").strip().partition("\n\n")[0].split())
        if summary:
            signature = f"def {node.name}({ast.unparse(node.args)})"
            yield node.lineno, f"{signature}\nSummary: ", summary


@cache
def _library() -> tuple[TextFile, ...]:
    return python_standard_library().files


@cache
def _rows_of_library() -> dict[str, list[Conversation]]:
    files = _library()
    held_out = held_out_modules(files)
    parts = {"train": files[: len(files) - len(held_out)], "validation": held_out}
    seen: set[tuple[str, str]] = set()
    rows: dict[str, list[Conversation]] = {"train": [], "validation": []}
    for split, modules in parts.items():
        for file in modules:
            for line, prompt, answer in instructions(file.path.read_bytes()):
                if (prompt, answer) not in seen:
                    seen.add((prompt, answer))
                    place = f"{file.path}, line {line}"
                    turns = (Turn(role="user", text=prompt), Turn(role=ASSISTANT, text=answer))
                    rows[split].append(Conversation(place=place, turns=turns, is_chat=False))
    return rows


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions within a node, also within its statements."""
    for block in ("body", "orelse", "handlers", "finalbody"):
        for statement in getattr(node, block, []):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield statement
            yield from _functions(statement)
