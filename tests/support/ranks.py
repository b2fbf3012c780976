"""Ranks of a distributed test, forked from the test's own process.

megatron-core takes seconds to import, so it is imported once, here in the parent, and every rank
starts as a fork that already has it. The ranks talk over gloo.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import random
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

_WARM_MODULES = (
    "megatron.core",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.pipeline_parallel",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    # get_megatron_optimizer imports it.
    "megatron.core.models.mimo.optimizer",
    "numpy.random",
)


class RankFailure(AssertionError):
    """A rank raised, died or did not finish in time; the message holds its traceback."""


@cache
def import_megatron_once() -> None:
    """Import the modules that ranks need before they are forked: once, without warnings."""
    from bridge.training.megatron_import import quiet_import

    with warnings.catch_warnings(), quiet_import():
        warnings.simplefilter("ignore")
        for name in _WARM_MODULES:
            importlib.import_module(name)


def run_ranks[T](
    world_size: int,
    function: Callable[..., T],
    *args: Any,
    timeout: float = 60,
    process_group: bool = True,
) -> list[T]:
    """Run ``function(*args)`` on `world_size` CPU ranks and return what each rank returned.

    Args:
        world_size: Number of ranks; 1 forks too, so nothing reaches the test's process.
        function: Any callable, closures included; its result must pickle.
        args: Passed to every rank as they are.
        timeout: Seconds until all ranks are killed.
        process_group: Initialize the default gloo group. Without it the rank only has its
            environment (RANK, WORLD_SIZE, ...), for code that initializes a group itself.

    Raises:
        RankFailure: With the traceback of the first rank that failed, or, after `timeout`, with
            the stack of every rank that still ran.
    """
    import_megatron_once()
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        family = _Family(Path(directory), world_size, process_group)
        try:
            for rank in range(world_size):
                family.fork(rank, function, args)
            return family.results(time.monotonic() + timeout)
        finally:
            family.reap()


class _Family:
    """The forked ranks of one call, with the pipes that bring their results back."""

    def __init__(self, directory: Path, world_size: int, process_group: bool) -> None:
        self.directory = directory
        self.world_size = world_size
        self.process_group = process_group
        self.port = _free_port()
        self.pids: dict[int, int] = {}
        self.readers: dict[int, int] = {}
        # Ranks wait for this pipe to close before they exit: a rank that left early would look
        # like a failed peer to those still in a collective.
        self.hold_read, self.hold_write = os.pipe()

    def fork(self, rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # The test runner's own threads; the child never returns to code that waits for them.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.close(reader)
            os.close(self.hold_write)
            self._be_rank(rank, writer, function, args)
        os.close(writer)
        self.pids[rank] = pid
        self.readers[rank] = reader

    def _be_rank(
        self, rank: int, writer: int, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> NoReturn:
        status = 1
        try:
            # A collection would copy every page that megatron-core's objects are on, in each rank.
            gc.freeze()
            die_with_parent()
            with open(self.directory / f"stack-{rank}", "w") as stack:
                faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
                report = self._run(rank, function, args)
                with open(writer, "wb") as pipe:
                    pipe.write(report)
                os.read(self.hold_read, 1)
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _run(self, rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
        try:
            _enter_environment(rank, self.world_size, self.port)
            if self.process_group:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{self.directory}/store",
                    rank=rank,
                    world_size=self.world_size,
                    timeout=timedelta(minutes=10),
                )
            return pickle.dumps((True, function(*args)))
        except BaseException:  # reported to the parent, which raises it
            return pickle.dumps((False, traceback.format_exc()))

    def results(self, deadline: float) -> list[Any]:
        """Collect one result a rank, or raise the first failure."""
        results: dict[int, Any] = {}
        received: dict[int, bytearray] = {rank: bytearray() for rank in self.readers}
        with selectors.DefaultSelector() as selector:
            for rank, reader in self.readers.items():
                selector.register(reader, selectors.EVENT_READ, rank)
            while len(results) < self.world_size:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RankFailure(self._timeout_message(set(self.pids) - set(results)))
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 20)
                    received[key.data] += chunk
                    if not chunk:
                        selector.unregister(key.fd)
                        results[key.data] = _result(key.data, bytes(received[key.data]))
        return [results[rank] for rank in range(self.world_size)]

    def _timeout_message(self, running: set[int]) -> str:
        for rank in running:
            os.kill(self.pids[rank], signal.SIGUSR2)
        time.sleep(0.3)
        stacks = [
            f"rank {rank} was at:\n{(self.directory / f'stack-{rank}').read_text()}"
            for rank in sorted(running)
        ]
        return "timeout: ranks were killed before they finished\n" + "\n".join(stacks)

    def reap(self) -> None:
        """Let finished ranks go, kill the others, and wait for all of them."""
        finished = sys.exc_info()[0] is None
        os.close(self.hold_write)
        os.close(self.hold_read)
        for pid in self.pids.values():
            if not finished:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for reader in self.readers.values():
            os.close(reader)


def _result(rank: int, report: bytes) -> Any:
    if not report:
        raise RankFailure(f"rank {rank} died without a report")
    ok, value = pickle.loads(report)
    if not ok:
        raise RankFailure(f"rank {rank} failed\n{value}")
    return value


def _enter_environment(rank: int, world_size: int, port: int) -> None:
    from bridge.training import cpu

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    cpu.enable()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; on Linux alone."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _free_port() -> int:
    # Below the ephemeral ports, which the system may assign at any moment.
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
