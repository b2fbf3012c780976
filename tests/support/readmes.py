"""The READMEs: their sections, code blocks, command lines and imports."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PACKAGES = sorted(ROOT.glob("packages/*/README.md"))
READMES = [
    README,
    ROOT / "packages" / "README.md",
    *PACKAGES,
    *sorted(ROOT.glob("tools/**/README.md")),
    *sorted(ROOT.glob("tests/**/README.md")),
]
_FENCE = re.compile(r"^```([a-z]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(readme: Path, title: str) -> str:
    """Return the text below a heading, up to the next heading of its level or above."""
    text = _FENCE.sub(lambda block: block[0].replace("\n#", "\n\0"), readme.read_text())
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.M | re.S)
    assert found, f"{readme} has no section {title!r}"
    return found[2].replace("\0", "#")


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks that are in one of these languages."""
    return [body for language, body in _FENCE.findall(text) if language in languages]


def code(readme: Path, title: str) -> str:
    """Return the Python block whose first line is the comment `title`."""
    [found] = [b for b in blocks(readme.read_text(), "python") if b.startswith(f"# {title}\n")]
    return found


def commands(text: str) -> list[str]:
    """Return the command lines, without comments and continuations."""
    joined = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    lines = [line.partition("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and line[0] != "#"]


def imported(text: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of what the blocks import of Bridge, ``from module import name``."""
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bridge"):
                yield from ((node.module or "", alias.name) for alias in node.names)
