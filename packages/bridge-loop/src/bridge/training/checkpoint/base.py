"""The base of adapters: weights that are recognized by their content, wherever they are."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bridge.training.checkpoint.manifest import MANIFEST
from bridge.training.checkpoint.run_state import EVALUATIONS
from bridge.training.config import ConfigContainer
from bridge.training.usage_error import UsageError

_BLOCKS, _BLOCK = 16, 1 << 16


@dataclass(frozen=True, kw_only=True)
class Base:
    """The frozen weights of a run that trains adapters."""

    place: str
    """The checkpoint that they were loaded from, or words for initial weights."""
    fingerprint: str
    """The same for the same weights, also where the checkpoint was copied or moved."""
    is_random: bool = False
    """Whether they are initial weights."""

    @classmethod
    def of(cls, config: ConfigContainer, checkpoint: Path | None) -> Self:
        """Describe a checkpoint, or the initial weights where there is none.

        Args:
            config: The run's resolved configuration.
            checkpoint: The checkpoint's folder.
        """
        if checkpoint is None:
            seed = f"initial weights of rng.seed={config.rng.seed}"
            return cls(place=seed, fingerprint=seed, is_random=True)
        return cls(place=str(checkpoint), fingerprint=fingerprint(checkpoint))

    def record(self) -> dict[str, str]:
        """Return the values that are saved with the adapters."""
        return {"place": self.place, "fingerprint": self.fingerprint}

    def reject_other_weights(self, saved: Mapping[str, str], checkpoint: Path) -> None:
        """Reject adapters that were trained on top of other weights.

        Args:
            saved: The `record` in the adapters' checkpoint.
            checkpoint: That checkpoint.

        Raises:
            UsageError: The weights are others.
        """
        if saved["fingerprint"] != self.fingerprint:
            raise UsageError(
                f"checkpoint.pretrained_checkpoint: {self.place} has other weights than "
                f"{saved['place']}, on top of which the adapters of {checkpoint} were trained; "
                "give that checkpoint, or where it has been moved to"
            )


def fingerprint(checkpoint: Path) -> str:
    """Return a digest of a checkpoint's files.

    Of large files it takes the size and blocks spread over them, so that it costs no more than
    reading a few MB: enough to distinguish the steps of a run, not to find a flipped bit. The
    configuration next to the weights does not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(checkpoint.rglob("*")):
        # The manifest has the configuration's checksum, and evaluations may come later; a process
        # that was killed may have left them under a temporary name.
        is_left_out = path.name in ("config.yaml", MANIFEST) or path.name.startswith(EVALUATIONS)
        if is_left_out or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(checkpoint)} {size} ".encode())
        with path.open("rb") as file:
            if size <= _BLOCKS * _BLOCK:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
