"""Signals ask the loop to stop, once, and leave no handler behind."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from bridge.training.stop_signals import SECONDS_OF_ONE_INTERRUPT, stop_signals
from ranks import run_ranks


def test_the_first_signal_is_remembered_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_ends_at_once_and_handlers_come_back() -> None:
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


def agreed_on_every_rank() -> tuple[str | None, str | None]:
    with stop_signals() as request:
        everyone = dist.group.WORLD
        assert everyone is not None
        nobody = request.agreed(everyone)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        one = request.agreed(everyone)
    return (nobody.name if nobody else None, one.name if one else None)


def test_all_ranks_stop_when_one_is_told_to() -> None:
    assert run_ranks(2, agreed_on_every_rank) == [(None, "SIGTERM")] * 2
