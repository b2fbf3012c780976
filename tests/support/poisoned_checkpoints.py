"""Checkpoints as an attacker would make them: unpickling them creates a folder."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, override

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from bridge.training.checkpoint.manifest import write_manifest
from bridge.training.run_files.directory import step_in_name


class Poison:
    """An object whose unpickling creates a folder, in place of any other code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


POISON_TYPE = f"{os.mkdir.__module__}.mkdir"


def poison(checkpoint: Path, where: str, marker: Path) -> None:
    """Put `Poison` into a checkpoint.

    Args:
        checkpoint: Its folder.
        where: "index" (.metadata), "common.pt" (of older forms), or a part of an entry's name.
        marker: The folder that unpickling creates.
    """
    step = step_in_name(checkpoint)
    if where == "common.pt":
        torch.save(Poison(marker), checkpoint / "common.pt")
    else:
        path = checkpoint / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        if where == "index":
            metadata.planner_data = Poison(marker)
        else:
            data = io.BytesIO()
            torch.save(Poison(marker), data)
            replace_entry(metadata, checkpoint, where, data.getvalue())
        path.write_bytes(pickle.dumps(metadata))
    # An attacker can compute checksums too.
    write_manifest(checkpoint, step=step)


def replace_entry(metadata: Any, checkpoint: Path, where: str, data: bytes) -> None:
    """Move an entry to a file of its own, with other content."""
    indices = [index for index in metadata.storage_data if where in index.fqn]
    assert indices, [index.fqn for index in metadata.storage_data]
    (checkpoint / "poison.distcp").write_bytes(data)
    metadata.storage_data[indices[0]] = _StorageInfo("poison.distcp", 0, len(data))
