"""Rows of earlier starts of a Weights & Biases run, read from the files that it leaves on disk.

Each start writes ``wandb/*run-TIMESTAMP-ID/run-ID.wandb``: a header of 7 bytes and records in the
format of LevelDB's log, each a protobuf message of wandb's. Where the writer was killed, the file
may end within a record; the records before it are complete.
"""

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)

_HEADER, _BLOCK, _CHUNK_HEADER = 7, 32768, 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class WandbRow:
    """A row that W&B has."""

    number: int
    """W&B's own ``_step``, which counts rows."""
    step: int
    """The optimizer step that the row is of."""
    names: frozenset[str]
    """The names of the values that it has."""


def written_rows(folder: Path) -> list[WandbRow]:
    """Return the rows in the files of all starts below ``folder``, in the order of their numbers.

    A record that is damaged is skipped with a warning.

    Args:
        folder: ``run_dir/wandb``, of one W&B run.
    """
    rows = []
    for path in folder.glob("*run-*/run-*.wandb"):
        damaged = 0
        for content in _records(path.read_bytes()):
            try:
                row = _row(content)
            except (ValueError, KeyError):
                damaged += 1
                continue
            rows += [] if row is None else [row]
        if damaged:
            _logger.warning(
                "%s: %d of its records are damaged; rows that W&B has already may be sent again",
                path,
                damaged,
            )
    return sorted(rows, key=lambda row: row.number)


def _row(content: bytes) -> WandbRow | None:
    """Return the row of a record, None for a record of something else.

    Raises:
        ValueError: The record is damaged.
        KeyError: The same.
    """
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    record = messages.Record()
    try:
        record.ParseFromString(content)
    except Exception as error:  # protobuf's own, which is no ValueError.
        raise ValueError(str(error)) from error
    if record.WhichOneof("record_type") != "history":
        return None
    history = record.history
    values = {item.key or ".".join(item.nested_key): item.value_json for item in history.item}
    number = int(values["_step"])
    return WandbRow(
        number=number,
        # Rows were numbered by their steps once.
        step=int(values.get("step", number)),
        names=frozenset(name for name in values if not name.startswith("_")) - {"step"},
    )


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the complete records of a file; the last one may be torn."""
    position, parts = _HEADER, list[bytes]()
    while position + _CHUNK_HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK_HEADER:  # The rest of a block that no chunk fits into is filled up.
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        start = position + _CHUNK_HEADER
        position = start + length
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or position > len(content):
            return
        parts = [*([] if kind in (_WHOLE, _FIRST) else parts), content[start:position]]
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)
