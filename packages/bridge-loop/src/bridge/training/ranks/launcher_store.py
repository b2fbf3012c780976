"""The store through which ranks find each other, and what the launcher says of this rank."""

import datetime
import os
from functools import cache
from typing import TYPE_CHECKING

import torch.distributed as dist

from bridge.training.launchers import rank_environment, rendezvous_url
from bridge.training.megatron_patches import default_store

if TYPE_CHECKING:
    pass


MEETING_PATIENCE = dist.default_pg_timeout


def world_size() -> int:
    """Return the number of ranks of this run, before or after torch.distributed is initialised."""
    return dist.get_world_size() if dist.is_initialized() else rank_environment().world_size


def rank() -> int:
    """Return this process's rank, before or after torch.distributed is initialised."""
    return dist.get_rank() if dist.is_initialized() else rank_environment().rank


def is_logging_rank() -> bool:
    """Whether this rank writes metrics and speaks to the user: rank 0, as every rank knows all."""
    return rank() == 0


def meeting_store(patience: datetime.timedelta = MEETING_PATIENCE) -> dist.Store:
    """Return the store of the default group; before there is one, that of the ranks' launcher.

    Args:
        patience: How long the ranks wait for each other at the launcher's store.

    Raises:
        UsageError: The launcher has left the ranks without an address.
        dist.DistError: They did not meet in time.
    """
    if dist.is_initialized():
        return default_store()
    return _launchers_store(patience)


@cache
def _launchers_store(patience: datetime.timedelta) -> dist.Store:
    # Kept: rank 0 may host it, and the others may still be at it when rank 0 starts its next run.
    own = rank_environment()
    found = dist.rendezvous(rendezvous_url(), own.rank, own.world_size, timeout=patience)
    store: dist.Store = next(found)[0]
    # torchrun starts failed ranks again with the store that the earlier ones have left.
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
