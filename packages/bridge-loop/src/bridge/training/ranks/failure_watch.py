"""Ranks that end together: a run on several ranks is over once it has failed on one of them.

A rank that waits in a collective for one that has failed waits until the collective's timeout, and
only some launchers end it before. So a rank that fails leaves word in the store through which the
ranks found each other, and on every rank a thread listens there, over a connection of its own. It
sleeps in the store until it is woken: it costs nothing while the run goes on.

Nothing interrupts a thread that waits inside a collective (aborting a gloo group does not wake it),
so a rank that does not come out by itself ends as a process.
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
from types import TracebackType
from typing import Self

import torch.distributed as dist

from bridge.training.ranks.launcher_store import MEETING_PATIENCE, meeting_store, rank, world_size
from bridge.training.usage_error import UsageError, is_usage_error

SECONDS_TO_NOTICE = 10.0
"""For a rank to fail by itself after another has: for the same reason a moment later, or since it
lost its connection. Both take less, and a rank that waits for ever is worth no more."""
SECONDS_TO_LEAVE = 20.0
"""For a rank that has failed to come to its end: trackers upload their last values then. With the
seconds to notice, all ranks are gone after 30."""
SECONDS_TO_HEAR = 2.0
"""For the others to read what rank 0 left, since the store may end with its process."""

MEETING_PATIENCE_AFTER_FAILURE = datetime.timedelta(seconds=10)
"""For the ranks to meet when one fails before they have."""

LONGEST_MESSAGE = 500
"""Characters of an exception's message that are told, in one line."""

# Shorter than what torch's sockets can wait for, which is counted in milliseconds of 32 bits. A
# wait that ends without an answer is logged by torch, so it is not to end often.
_ONE_WAIT = datetime.timedelta(days=20)
_STORE_IS_GONE = (
    "the process has ended that kept the store of the process groups (rank 0 or the launcher)"
)


class PeerWatch:
    """Tells the other ranks when the run fails on this one, and ends this one when they fail.

    A context around a run. An exception that leaves it gets a note with the rank and what it was
    doing; with several ranks the others hear of it. When the context is left, nothing watches any
    more. A run on one rank has no peers: only the note is added.
    """

    def __init__(self, on_failure: Callable[[BaseException, str], None] | None = None) -> None:
        """Prepare the watch of one run.

        Args:
            on_failure: What `bridge.training.pretrain.pretrain` takes.
        """
        self.phase: Callable[[], str] = lambda: "set-up"
        """What this rank is doing."""
        self.timeout_minutes: float | None = None
        """dist.timeout_minutes, once it is known."""
        began = time.monotonic()
        self.met_at: Callable[[], float] = lambda: began
        """When all ranks last took part in something, on the clock of `time.monotonic`."""
        self._rank, self._world_size = rank(), world_size()
        self._on_failure = on_failure
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._needs_peers = True
        self._error: BaseException | None = None
        self._heard: str | None = None
        self._rejection: str | None = None

    def __enter__(self) -> Self:
        """Listen to the ranks, if they have met already."""
        if dist.is_initialized():
            self.join()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell what ended the run, if that has not been done, and stop listening."""
        rejection = None if error is None else self._fail(error)
        with self._ending:
            self._left.set()
        if self._store is not None and self._thread is not None:
            self._stop_listening(self._store, self._thread)
        if rejection is not None:
            raise rejection from error

    def _stop_listening(self, store: dist.Store, thread: threading.Thread) -> None:
        if thread.is_alive() and self._heard is None:
            # The store may go at this very moment.
            with contextlib.suppress(dist.DistError):
                store.set(_bell(self._rank), "")
        # It would not wake if the store's machine were gone without a trace.
        thread.join(timeout=SECONDS_TO_HEAR)

    def join(self, patience: datetime.timedelta = MEETING_PATIENCE) -> None:
        """Meet the other ranks, unless that has been done, and listen to them from now on.

        Args:
            patience: How long to wait for them.
        """
        if self._world_size == 1 or self._store is not None:
            return
        common = meeting_store(patience)
        if not isinstance(_innermost(common), dist.TCPStore | dist.FileStore):
            return  # The ranks are threads of one process, or none at all (torch's fake backend).
        # Every rank joins every run once, so their counts agree; earlier runs' keys are not read.
        prefix = f"peers/run-{common.add(f'peers/runs-of-{self._rank}', 1)}"
        own = common.clone()  # type: ignore[attr-defined]  # torch's stub leaves it out.
        self._store = dist.PrefixStore(prefix, common)
        self._thread = threading.Thread(
            target=self._listen, args=(dist.PrefixStore(prefix, own),), name="peers", daemon=True
        )
        self._thread.start()

    @contextlib.contextmanager
    def told_at_once(self) -> Iterator[None]:
        """Tell of an exception in this block before anything is taken down for it."""
        try:
            yield
        except BaseException as error:
            rejection = self._fail(error)
            if rejection is not None:
                raise rejection from error
            raise

    def needs_no_peers(self) -> None:
        """Take the loss of the store for no failure from now on: the last collective is over."""
        self._needs_peers = False

    def _fail(self, error: BaseException) -> UsageError | None:
        """Tell what ended the run here; return what is to be raised instead, if it follows from it.

        That is another rank's rejection of a user's mistake: the loss of that rank is no news.
        """
        if self._error is not None:
            return None
        self._error = error
        if isinstance(error, Exception) and not is_usage_error(error):
            rejection = self._rejection_of_another_rank()
            if rejection is not None:
                self._error = UsageError(rejection)
                return self._error
        phase = self.phase()
        message = " ".join(str(error).split())[:LONGEST_MESSAGE]
        what = f"{type(error).__name__}: {message}" if message else type(error).__name__
        if self._heard is not None:
            error.add_note(f"after {self._heard}")
        if (note := self._note_of_timeout(error)) is not None:
            error.add_note(note)
            what = f"{what}; {note}"
        error.add_note(f"rank {self._rank}, in {phase}")
        # Whoever pressed Ctrl-C need not be told.
        if not isinstance(error, KeyboardInterrupt):
            line = f"rank {self._rank}, in {phase}: {what}"
            if self._on_failure is not None:
                self._on_failure(error, line)
            elif self._world_size > 1:
                _say(line)
        if self._world_size > 1 and self._heard != _STORE_IS_GONE:
            try:
                rejection = str(error) if is_usage_error(error) else None
                self._tell(f"rank {self._rank} failed in {phase}: {what}", rejection)
            except Exception as trouble:  # It must not take the place of what ended the run.
                _say(f"rank {self._rank}: cannot tell the other ranks: {trouble}")
        return None

    def _rejection_of_another_rank(self) -> str | None:
        """Return the message of a user's mistake, where one ended the run on the first rank."""
        if self._store is None:
            return None
        try:
            if not self._store.check(["failure"]):
                return None
            _, rejection = json.loads(self._store.get("failure"))
        except dist.DistError:
            return None
        return None if rejection is None else str(rejection)

    def _note_of_timeout(self, error: BaseException) -> str | None:
        """Name the setting, if an exception looks like the end of a wait for other ranks.

        torch's backends raise plain RuntimeErrors for it. So it is told by its place, which is
        torch's or megatron-core's code for collectives, and by the time that it took.
        """
        waited = time.monotonic() - self.met_at()
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

    def _tell(self, word: str, rejection: str | None) -> None:
        """Leave word for the other ranks, unless one of them has."""
        self.join(MEETING_PATIENCE_AFTER_FAILURE)
        if self._store is None:
            return
        left = json.dumps([word, rejection])
        if self._store.compare_set("failure", "", left) == left.encode():
            for other in range(self._world_size):
                self._store.set(_bell(other), "")
        # The store answers in turn: it has all of that before this process can end.
        awake = self._store.add("awake", 0)
        if self._rank == 0 and not isinstance(self._error, KeyboardInterrupt):
            deadline = time.monotonic() + SECONDS_TO_HEAR
            while awake < self._world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                awake = self._store.add("awake", 0)

    def _listen(self, store: dist.Store) -> None:
        self._heard = word = self._next_word(store)
        if word is None:
            return
        if self._error is None:
            self._left.wait(SECONDS_TO_NOTICE)
        if self._error is not None:
            self._left.wait(SECONDS_TO_LEAVE)
        with self._ending:
            if self._left.is_set() or (word == _STORE_IS_GONE and not self._needs_peers):
                return
            if self._error is not None:
                word = f"it has not left the run {SECONDS_TO_LEAVE:.0f} s after it failed"
            _say(f"rank {self._rank}, in {self.phase()}: ends, since {word}")
            with contextlib.suppress(OSError, ValueError):  # Closed, or nobody reads it any more.
                sys.stdout.flush()
            os._exit(1 if self._rejection is None else 2)

    def _next_word(self, store: dist.Store) -> str | None:
        """Wait until a rank has failed; return what it said, None once this one has left."""
        while not self._left.is_set():
            try:
                store.wait([_bell(self._rank)], _ONE_WAIT)
                word = None
                if store.check(["failure"]):
                    word, self._rejection = json.loads(store.get("failure"))
                store.add("awake", 1)
                return word
            except dist.DistNetworkError:
                return _STORE_IS_GONE
            except dist.DistStoreError:
                # Nothing in so long a time; or a store in a file, and the file has been removed.
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


def _bell(rank: int) -> str:
    """Return the key that wakes the thread of a rank."""
    return f"bell-{rank}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # Closed, or nobody reads it any more.
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
