"""Collectives on Python objects: one rank decides and all learn it, exceptions included."""

import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def on_first_rank[T](function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call on global rank 0 only and return its result, or raise its exception, on every rank.

    An exception that went to one rank alone would leave the others waiting for it.

    Args:
        function: Called without arguments; its result must pickle.
        group: All ranks; the default group if None.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    result: T | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = function()
        except Exception as error:
            failure = error
    outcome: list[Any] = [result, None if failure is None else _told(failure)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise _retold(*outcome[1])
    agreed: T = outcome[0]
    return agreed


def from_every_rank[T](value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return what every rank gave, by rank, on every rank; a collective.

    Args:
        value: This rank's; it must pickle.
        group: All ranks; the default group if None.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _told(failure: Exception) -> tuple[bytes, str]:
    """Return an exception of rank 0 pickled, if it can be, and its traceback."""
    try:
        pickled = pickle.dumps(failure)
    except Exception:
        pickled = b""
    return pickled, "".join(traceback.format_exception(failure))


def _retold(pickled: bytes, trace: str) -> Exception:
    """Return the exception that was pickled; a RuntimeError if it cannot be made again here."""
    try:
        failure: Exception = pickle.loads(pickled)
    except Exception:
        failure = RuntimeError("rank 0 failed")
    failure.add_note(f"raised on rank 0:\n{trace.rstrip()}")
    return failure
