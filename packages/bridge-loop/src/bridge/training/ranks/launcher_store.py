"""The launcher's store, through which ranks find each other, and this rank's number."""

import datetime
import os
from functools import cache

import torch.distributed as dist

from bridge.training.launchers import rank_environment, rendezvous_url
from bridge.training.megatron_patches import default_store

MEETING_PATIENCE = dist.default_pg_timeout
"""Time for the ranks to meet at the launcher's store."""


def world_size() -> int:
    """Return the number of ranks of this run, before or after torch.distributed is initialized."""
    return dist.get_world_size() if dist.is_initialized() else rank_environment().world_size


def rank() -> int:
    """Return this process's rank, before or after torch.distributed is initialized."""
    return dist.get_rank() if dist.is_initialized() else rank_environment().rank


def is_logging_rank() -> bool:
    """Whether this rank writes metrics and messages: rank 0, as results are equal on every rank."""
    return rank() == 0


def meeting_store(patience: datetime.timedelta = MEETING_PATIENCE) -> dist.Store:
    """Return the store of the default group; before there is one, that of the ranks' launcher.

    Args:
        patience: How long the ranks wait for each other at the launcher's store.

    Raises:
        UsageError: The launcher gave the ranks no address.
        dist.DistError: They did not meet in time.
    """
    if dist.is_initialized():
        return default_store()
    return _launchers_store(patience)


@cache
def _launchers_store(patience: datetime.timedelta) -> dist.Store:
    # Cached, as rank 0 may host it while the others still use it for an earlier run.
    own = rank_environment()
    found = dist.rendezvous(rendezvous_url(), own.rank, own.world_size, timeout=patience)
    store: dist.Store = next(found)[0]
    # torchrun restarts failed ranks with the same store, which has the keys of the earlier ones.
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
