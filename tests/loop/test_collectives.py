"""Rank 0 works for all ranks."""

import os
import traceback

import pytest

from bridge.training.ranks.collectives import on_first_rank
from bridge.training.usage_error import UsageError
from ranks import run_ranks


class Unusual(Exception):
    """Takes two arguments and passes one to its base class, so that pickle cannot rebuild it."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (ValueError("seven"), "ValueError"),
        (UsageError("dataset.path: seven"), "UsageError"),
        (Unusual(6, 7), "RuntimeError"),
    ],
)
def test_the_result_or_exception_of_rank_zero_reaches_all_ranks(
    error: Exception, elsewhere: str
) -> None:
    def rank() -> tuple[int, str, str]:
        agreed = on_first_rank(os.getpid)
        try:
            on_first_rank(lambda: fail_with(error))
        except Exception as found:
            return agreed, type(found).__name__, "".join(traceback.format_exception(found))
        return agreed, "no error", ""

    (agreed, first, _), (same, second, trace) = run_ranks(2, rank)
    assert agreed == same
    assert (first, second) == (type(error).__name__, elsewhere)
    # The traceback on another rank shows the line on rank 0.
    assert "raised on rank 0:" in trace
    assert "in fail_with" in trace
    assert str(error) in trace
