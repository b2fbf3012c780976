"""The end of all ranks when one fails.

A rank that waits in a collective for a failed rank waits until the collective's timeout, and only
some launchers end it before. So a failing rank posts a message in the store through which the ranks
found each other. On every rank a thread waits for that message, over a connection of its own. It is
blocked in the store and costs nothing while the run goes on.

Nothing interrupts a thread that waits inside a collective (aborting a gloo group does not wake it).
So a rank that does not leave the run by itself ends as a process.
"""

import contextlib
import datetime
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Self

import torch.distributed as dist

from bridge.training.ranks.launcher_store import MEETING_PATIENCE, meeting_store, rank, world_size
from bridge.training.usage_error import UsageError, is_usage_error

SECONDS_TO_NOTICE = 10.0
"""Time for a rank to fail by itself after another one: for the same reason a moment later, or
because it lost its connection. Both take less."""
SECONDS_TO_LEAVE = 20.0
"""Time for a failed rank to end, while trackers upload their last values. With the seconds to
notice, all ranks are gone after 30."""
SECONDS_TO_READ = 2.0
"""Time for the other ranks to read the message of rank 0, as the store may end with its process."""

MEETING_PATIENCE_AFTER_FAILURE = datetime.timedelta(seconds=10)
"""Time for the ranks to meet when one fails before they have met."""

LONGEST_MESSAGE = 500
"""Characters of an exception's message that are posted, in one line."""

# Shorter than the longest wait of torch's sockets, 2**31 milliseconds. torch logs each wait that
# ends without an answer, so waits are long.
_ONE_WAIT = datetime.timedelta(days=20)
_FAILURE, _READERS = "failure", "readers"
"""Keys of the store: the first failure, and the number of ranks that have read it."""
_STORE_IS_GONE = (
    "the process has ended that kept the store of the process groups (rank 0 or the launcher)"
)


class FailureWatch:
    """A context around a run that posts this rank's failure, and ends this rank when others fail.

    An exception that leaves the context gets a note with the rank and the phase of the run, and is
    posted to the other ranks. When the context is left, the thread ends. On one rank only the note
    is added.
    """

    def __init__(self, on_failure: Callable[[BaseException, str], None] | None = None) -> None:
        """Prepare the watch of one run.

        Args:
            on_failure: As for `bridge.training.pretrain.pretrain`.
        """
        self.phase: Callable[[], str] = lambda: "set-up"
        """Returns the phase of the run on this rank."""
        self.timeout_minutes: float | None = None
        """dist.timeout_minutes, once it is known."""
        start = time.monotonic()
        self.last_agreement: Callable[[], float] = lambda: start
        """Returns when all ranks last took part in a collective, on the clock of
        `time.monotonic`."""
        self._rank, self._world_size = rank(), world_size()
        self._on_failure = on_failure
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._needs_store = True
        self._error: BaseException | None = None
        self._message_of_peer: str | None = None
        self._rejection_of_peer: str | None = None

    def __enter__(self) -> Self:
        """Wait for messages of the other ranks, if they have met already."""
        if dist.is_initialized():
            self.join()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Post the exception that ended the run, unless it is posted, and end the thread."""
        rejection = None if error is None else self._report(error)
        with self._ending:
            self._left.set()
        if self._store is not None and self._thread is not None:
            self._end_thread(self._store, self._thread)
        if rejection is not None:
            raise rejection from error

    def _end_thread(self, store: dist.Store, thread: threading.Thread) -> None:
        if thread.is_alive() and self._message_of_peer is None:
            # The store may be lost at this very moment.
            with contextlib.suppress(dist.DistError):
                store.set(_wake_key(self._rank), "")
        # The thread does not wake if the store's machine is lost without closing the connection.
        thread.join(timeout=SECONDS_TO_READ)

    def join(self, patience: datetime.timedelta = MEETING_PATIENCE) -> None:
        """Meet the other ranks, unless they have met, and wait for their messages from now on.

        Args:
            patience: Longest time to wait for them.
        """
        if self._world_size == 1 or self._store is not None:
            return
        common = meeting_store(patience)
        if not isinstance(_innermost(common), dist.TCPStore | dist.FileStore):
            return  # The ranks are threads of one process, or torch's fake backend has none.
        # Every rank joins every run once, so their counts agree and no key of an earlier run is
        # read.
        prefix = f"peers/run-{common.add(f'peers/runs-of-{self._rank}', 1)}"
        own = common.clone()  # type: ignore[attr-defined]  # torch's stub leaves it out.
        self._store = dist.PrefixStore(prefix, common)
        self._thread = threading.Thread(
            target=self._wait_for_failure,
            args=(dist.PrefixStore(prefix, own),),
            name="peers",
            daemon=True,
        )
        self._thread.start()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Post an exception of this block before its cleanup, which may wait for other ranks."""
        try:
            yield
        except BaseException as error:
            rejection = self._report(error)
            if rejection is not None:
                raise rejection from error
            raise

    def accept_loss_of_store(self) -> None:
        """Treat the loss of the store as no failure from now on: the last collective is over."""
        self._needs_store = False

    def _report(self, error: BaseException) -> UsageError | None:
        """Add notes to the first exception of this rank, print it, and post it to the others.

        Returns:
            The exception to raise instead, where another rank rejected a user's mistake before: the
            failure here is only a consequence of it.
        """
        if self._error is not None:
            return None
        self._error = error
        if isinstance(error, Exception) and not is_usage_error(error):
            rejection = self._find_rejection()
            if rejection is not None:
                self._error = UsageError(rejection)
                return self._error
        phase, description = self.phase(), self._describe(error)
        error.add_note(f"rank {self._rank}, in {phase}")
        # The user who pressed Ctrl-C needs no message.
        if not isinstance(error, KeyboardInterrupt):
            line = f"rank {self._rank}, in {phase}: {description}"
            if self._on_failure is not None:
                self._on_failure(error, line)
            elif self._world_size > 1:
                _print(line)
        if self._world_size > 1 and self._message_of_peer != _STORE_IS_GONE:
            try:
                rejection = str(error) if is_usage_error(error) else None
                self._post(f"rank {self._rank} failed in {phase}: {description}", rejection)
            except Exception as trouble:  # It must not take the place of the run's exception.
                _print(f"rank {self._rank}: cannot notify the other ranks: {trouble}")
        return None

    def _describe(self, error: BaseException) -> str:
        """Return an exception in one line; add notes on its cause to it."""
        message = " ".join(str(error).split())[:LONGEST_MESSAGE]
        description = f"{type(error).__name__}: {message}" if message else type(error).__name__
        if self._message_of_peer is not None:
            error.add_note(f"after {self._message_of_peer}")
        if (note := self._note_of_timeout(error)) is not None:
            error.add_note(note)
            description = f"{description}; {note}"
        return description

    def _find_rejection(self) -> str | None:
        """Return the posted message of a user's mistake, if that was the run's first failure."""
        if self._store is None:
            return None
        try:
            if not self._store.check([_FAILURE]):
                return None
            _, rejection = json.loads(self._store.get(_FAILURE))
        except dist.DistError:
            return None
        return None if rejection is None else str(rejection)

    def _note_of_timeout(self, error: BaseException) -> str | None:
        """Return a note on dist.timeout_minutes for an exception that ended a wait for other ranks.

        torch's backends raise plain RuntimeErrors for it. So it is recognized by the code that
        raised it, torch's or megatron-core's collectives, and by the time that it took.
        """
        waited = time.monotonic() - self.last_agreement()
        if (
            self._world_size == 1
            or self.timeout_minutes is None
            or waited < 60 * self.timeout_minutes
            or not isinstance(error, RuntimeError)
            or not _module_that_raised(error).startswith(("torch.distributed", "megatron.core"))
        ):
            return None
        return (
            f"dist.timeout_minutes={self.timeout_minutes:g}: a collective waits no longer for the "
            f"other ranks, and the last that all took part in was {waited:.0f} s ago; raise it if "
            "a rank may take so long"
        )

    def _post(self, message: str, rejection: str | None) -> None:
        """Post a message for the other ranks, unless one of them has posted another."""
        self.join(MEETING_PATIENCE_AFTER_FAILURE)
        if self._store is None:
            return
        posted = json.dumps([message, rejection])
        if self._store.compare_set(_FAILURE, "", posted) == posted.encode():
            for other in range(self._world_size):
                self._store.set(_wake_key(other), "")
        # The store answers in turn: it has all of that before this process can end.
        readers = self._store.add(_READERS, 0)
        if self._rank == 0 and not isinstance(self._error, KeyboardInterrupt):
            deadline = time.monotonic() + SECONDS_TO_READ
            while readers < self._world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                readers = self._store.add(_READERS, 0)

    def _wait_for_failure(self, store: dist.Store) -> None:
        """End this process some time after a rank has failed, unless it leaves the run before."""
        self._message_of_peer = message = self._next_message(store)
        if message is None:
            return
        if self._error is None:
            self._left.wait(SECONDS_TO_NOTICE)
        if self._error is not None:
            self._left.wait(SECONDS_TO_LEAVE)
        with self._ending:
            if self._left.is_set() or (message == _STORE_IS_GONE and not self._needs_store):
                return
            if self._error is not None:
                message = f"it has not left the run {SECONDS_TO_LEAVE:.0f} s after it failed"
            _print(f"rank {self._rank}, in {self.phase()}: ends, since {message}")
            with contextlib.suppress(OSError, ValueError):  # Closed, or nobody reads it any more.
                sys.stdout.flush()
            os._exit(1 if self._rejection_of_peer is None else 2)

    def _next_message(self, store: dist.Store) -> str | None:
        """Wait until a rank has failed; return its message, None once this rank has left."""
        while not self._left.is_set():
            try:
                store.wait([_wake_key(self._rank)], _ONE_WAIT)
                message = None
                if store.check([_FAILURE]):
                    message, self._rejection_of_peer = json.loads(store.get(_FAILURE))
                store.add(_READERS, 1)
                return message
            except dist.DistNetworkError:
                return _STORE_IS_GONE
            except dist.DistStoreError:
                # The long wait has ended, or the store is a file that has been removed.
                continue
        return None


def _innermost(store: dist.Store) -> dist.Store:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _module_that_raised(error: BaseException) -> str:
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
    return module


def _wake_key(rank: int) -> str:
    """Return the key that wakes the thread of a rank."""
    return f"wake-{rank}"


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # Closed, or nobody reads it any more.
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
