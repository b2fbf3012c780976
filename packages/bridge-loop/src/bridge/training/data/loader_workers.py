"""Data loading processes of a rank: their signals, their end, and the cause of their death.

Schedulers and ``timeout`` send a signal to every process of a run, and Ctrl-C reaches all of a
terminal. The training process then finishes its step, and needs its workers until the end of it. So
the workers ignore the signals that ask a run to stop (`bridge.training.ranks.stop_request`). They
end when the run closes them. torch ends them within five seconds of their training process' death.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from bridge.training.megatron_patches import forget_workers, on_unsent_batch, shut_down_workers
from bridge.training.ranks.stop_request import STOP_SIGNALS
from bridge.training.usage_error import UsageError

_SOCKET_BYTES = 107
_SOCKET_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"
"""The name that Python's multiprocessing gives a socket in the folder for temporary files."""


class WorkerDied(RuntimeError):
    """The death of a data loading process, which was killed or ended by itself."""


class LoaderWorkers:
    """The data loading processes of one run on this rank; close them when it ends.

    Args:
        number: Processes of a loader.

    Raises:
        UsageError: They could not send a batch.
    """

    def __init__(self, number: int) -> None:
        if number:
            _check_temporary_folder(number)
        self._loaders: list[tuple[weakref.ref[Any], list[multiprocessing.process.BaseProcess]]] = []

    def iterate(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Start the workers of a loader that has `prepare_worker`; return its iterator."""
        if not loader.num_workers:
            return iter(loader)
        self._loaders = [
            (iterator, workers)
            for iterator, workers in self._loaders
            if any(worker.exitcode != 0 for worker in workers)
        ]
        others = multiprocessing.active_children()
        # The workers inherit the mask, so that no signal reaches them before they ignore it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            iterator: Iterator[Any] = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        started = [child for child in multiprocessing.active_children() if child not in others]
        workers = sorted(started, key=lambda worker: worker.pid or 0)
        self._loaders.append((weakref.ref(iterator), workers))
        return iterator

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise `WorkerDied` from an exception in this block, if a worker's death was its cause.

        torch raises the exception wherever this process is when the worker dies. In a save it is
        torch's CheckpointException, which is no Exception.

        Raises:
            WorkerDied: The message has the settings to change.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            death = self._death()
            if death is None:
                raise
            raise WorkerDied(death) from error

    def close(self, *, at_once: bool = False) -> None:
        """End all workers; those that do not leave within torch's five seconds are killed.

        Args:
            at_once: Kill them without waiting.
        """
        for reference, workers in self._loaders:
            iterator = reference()
            # A traceback may keep it alive. Until it is closed, torch takes the end of a worker for
            # a failure.
            if iterator is not None and at_once:
                forget_workers(iterator)
            elif iterator is not None:
                shut_down_workers(iterator)
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                    worker.join()
        self._loaders = []

    def _death(self) -> str | None:
        for _, workers in self._loaders:
            for number, worker in enumerate(workers, start=1):
                worker.join(timeout=0)
                if not worker.exitcode:
                    continue
                named = f"data loading worker {number} of {len(workers)} (process {worker.pid})"
                if worker.exitcode > 0:
                    return f"{named} ended with exit code {worker.exitcode}"
                by = signal.Signals(-worker.exitcode)
                return f"{named} was killed by {by.name}: {_advice(by, len(workers))}"
        return None


def _advice(by: signal.Signals, workers: int) -> str:
    fewer = f"lower train.num_workers={workers} (0 loads in the training process)"
    if by == signal.SIGKILL:
        return (
            "the system does that to a process when memory runs out; "
            f"{fewer}, or give the job more memory"
        )
    if by == signal.SIGBUS:
        return f"shared memory is full; {fewer}, or enlarge /dev/shm (docker run --shm-size)"
    return f"the fault is in the dataset or a library that it uses; to find it {fewer}"


def _check_temporary_folder(workers: int) -> None:
    folder = tempfile.gettempdir()
    longest = _SOCKET_BYTES - len(_SOCKET_NAME)
    if len(os.fsencode(folder)) > longest:
        raise UsageError(
            f"train.num_workers={workers}: data loading workers make sockets in the folder for "
            f"temporary files, and {folder!r} is too long for their names; set TMPDIR to a path of "
            f"at most {longest} bytes, or train.num_workers=0"
        )


def prepare_worker(worker: int) -> None:
    """Make a worker ignore requests to stop, and end when it cannot send a batch.

    A loader's `worker_init_fn`.

    Args:
        worker: Its number.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # Without it the batch is dropped, and the run waits for it.
    on_unsent_batch(_end_with_error)


def _end_with_error(error: Exception, batch: Any) -> None:
    traceback.print_exception(error)
    os._exit(1)
