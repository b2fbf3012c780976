"""Collectives of the hosts: one rank decides and all learn it, exceptions included."""

import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def on_first_rank[T](function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call a function on global rank 0; return its result, or raise its exception, on every rank.

    If rank 0 alone raised the exception, the others would wait for it.

    Args:
        function: Called without arguments; its result must pickle.
        group: All ranks; the default group if None.
    """
    if _is_alone(None):
        return function()
    result: T | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = function()
        except Exception as error:
            failure = error
    outcome: list[Any] = [result, None if failure is None else _pack(failure)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise _unpack(*outcome[1])
    agreed: T = outcome[0]
    return agreed


def from_every_rank[T](value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the value of every rank, by rank, on every rank; a collective.

    Args:
        value: This rank's; it must pickle.
        group: The ranks; the default group if None.
    """
    if _is_alone(group):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def largest_of_all(number: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the largest of the ranks' numbers, on every rank; a collective.

    Args:
        number: This rank's; from 0 to 2**31 - 1.
        group: The ranks, over gloo, so that no GPU is waited for; the default group if None.
    """
    if _is_alone(group):
        return number
    largest = torch.tensor(number, dtype=torch.int32)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest.item())


def sum_of_all(numbers: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """Return the sums of the ranks' numbers, on every rank; a collective.

    Args:
        numbers: This rank's; as many on each.
        group: As for `largest_of_all`.
    """
    sums = torch.tensor(numbers, dtype=torch.int64)
    if not _is_alone(group):
        dist.all_reduce(sums, group=group)
    totals: list[int] = sums.tolist()
    return totals


def _is_alone(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_world_size(group) == 1


def _pack(failure: Exception) -> tuple[bytes, str]:
    """Return an exception of rank 0 pickled, or nothing if it cannot be, and its traceback."""
    try:
        pickled = pickle.dumps(failure)
    except Exception:
        pickled = b""
    return pickled, "".join(traceback.format_exception(failure))


def _unpack(pickled: bytes, trace: str) -> Exception:
    """Return the exception of `_pack`; a RuntimeError if it cannot be unpickled here."""
    try:
        failure: Exception = pickle.loads(pickled)
    except Exception:
        failure = RuntimeError("rank 0 failed")
    failure.add_note(f"raised on rank 0:\n{trace.rstrip()}")
    return failure
