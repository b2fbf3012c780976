"""Signals ask the loop to stop, once, and leave no handler behind."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from bridge.training.ranks.stop_request import (
    SECONDS_OF_ONE_INTERRUPT,
    STOP_SIGNALS,
    StopRequest,
    stop_signals,
)
from ranks import run_ranks


def test_the_first_signal_is_remembered_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_is_the_cause_by_its_name(number: signal.Signals) -> None:
    def body() -> tuple[str | None, bool]:
        before = signal.getsignal(number)
        with stop_signals() as request:
            os.kill(os.getpid(), number)
            cause = request.agree(all_ranks())
        return cause, signal.getsignal(number) == before

    assert run_ranks(1, body) == [(number.name, True)]


def test_a_hangup_stays_ignored_where_it_was_as_under_nohup() -> None:
    def body() -> bool:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            return request.is_pending

    assert run_ranks(1, body, process_group=False) == [False]


def test_a_second_ctrl_c_ends_at_once_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1 * SECONDS_OF_ONE_INTERRUPT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_ctrl_c_that_is_passed_on_once_more_is_one() -> None:
    with stop_signals() as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
    assert request.signal == signal.SIGINT


def all_ranks() -> dist.ProcessGroup:
    everyone = dist.group.WORLD
    assert everyone is not None
    return everyone


def agreed_on_every_rank() -> tuple[str | None, str | None]:
    with stop_signals() as request:
        nobody = request.agree(all_ranks())
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        one = request.agree(all_ranks())
    return nobody, one


def test_all_ranks_stop_when_one_gets_a_signal() -> None:
    assert run_ranks(2, agreed_on_every_rank) == [(None, "SIGTERM")] * 2


def test_a_time_limit_is_over_at_its_time_and_not_before() -> None:
    request = StopRequest(ends_at=time.monotonic() + 0.2)
    assert not request.is_pending
    time.sleep(0.25)
    assert request.is_pending
    assert not StopRequest().is_pending


def test_all_ranks_stop_when_the_time_of_one_is_over() -> None:
    def body() -> str | None:
        return StopRequest(0.0 if dist.get_rank() == 1 else None).agree(all_ranks())

    assert run_ranks(2, body) == ["time limit"] * 2


def test_a_signal_counts_more_than_the_time_limit_and_what_was_agreed_stays() -> None:
    def body() -> list[str | None]:
        with stop_signals(0.0 if dist.get_rank() == 0 else None) as request:
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGINT)
            first = request.agree(all_ranks())
            os.kill(os.getpid(), signal.SIGTERM)
            return [first, request.agree(all_ranks()), request.cause]

    assert run_ranks(2, body) == [["SIGINT"] * 3] * 2
