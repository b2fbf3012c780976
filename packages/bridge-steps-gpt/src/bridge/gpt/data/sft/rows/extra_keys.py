"""Extra keys of rows and turns, which are not read: rejected unless the user ignores them.

If a tool, a reasoning or a weight of 0 were skipped silently, the rows would be other data.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from shlex import quote
from typing import Any, Literal

type Holder = Literal["rows", "turns"]
"""The objects with the key: rows, or the turns of their conversations."""


@dataclass
class _Count:
    """The rows that have a key."""

    first: str
    """The place of the first row."""
    rows: int = 0


@dataclass
class ExtraKeys:
    """The extra keys in the rows of a source."""

    ignored: Collection[str]
    """The keys that the user ignores (dataset.ignore_keys)."""
    _seen: dict[tuple[str, Holder], _Count] = field(default_factory=dict)

    def add(self, keys: Iterable[tuple[str, Holder]], place: str) -> None:
        """Count the extra keys of the row at `place`."""
        for key in dict.fromkeys(keys):
            self._seen.setdefault(key, _Count(first=place)).rows += 1

    def rows_with_ignored(self) -> dict[str, int]:
        """Return the number of rows with each ignored key; of rows or of turns, the larger."""
        found: dict[str, int] = {}
        for (key, _), seen in self._seen.items():
            if key in self.ignored:
                found[key] = max(found.get(key, 0), seen.rows)
        return found

    def problem(self) -> str | None:
        """Return the problem with the rows' keys; None if all are read or ignored."""
        found = {key: seen for key, seen in self._seen.items() if key[0] not in self.ignored}
        if not found:
            return None
        described = ", ".join(
            f"{key!r} of {holder} (in {seen.rows} row{'s' if seen.rows > 1 else ''}, the first is "
            f"{seen.first})"
            for (key, holder), seen in found.items()
        )
        names = dict.fromkeys([*self.ignored, *(key for key, _ in found)])
        setting = f"dataset.ignore_keys=[{','.join(map(_in_yaml, names))}]"
        return (
            f"keys that are not read would be lost: {described}; take them out, or ignore them "
            f"with {quote(setting)}"
        )


def extra_keys_in(record: Mapping[str, Any], used: Collection[str]) -> list[str]:
    """Return the keys of a row or a turn that have a value and are not in `used`.

    Null, an empty text and an empty list are no value: tables have them where a row lacks a key.
    """
    return [
        str(key)
        for key, value in record.items()
        if key not in used and not (value is None or (isinstance(value, _EMPTY) and not value))
    ]


def _in_yaml(name: str) -> str:
    """Return a name as an item of a list on the command line, which is YAML."""
    is_plain = _PLAIN.fullmatch(name) and name.lower() not in ("true", "false", "null")
    return name if is_plain else json.dumps(name)


_PLAIN = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_EMPTY = (str, list, tuple, dict)
