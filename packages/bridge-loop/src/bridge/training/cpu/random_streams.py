"""The random numbers of the device in the CPU emulation.

On a GPU machine the host and the device have generators of their own: the host's draws (data order,
shuffles) do not advance the device's stream (dropout, weights). CPU kernels draw from torch's one
CPU generator. So the device's state is put into that generator, the kernel runs, and the state is
taken out again.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import override

import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

_HOST = torch.default_generator


class DeviceStream:
    """The stream of random numbers that a GPU's default generator would hold."""

    def __init__(self) -> None:
        self._parked = torch.Generator()
        self._lent = False

    def _holder(self) -> torch.Generator:
        return _HOST if self._lent else self._parked

    def manual_seed(self, seed: int) -> None:
        """Restart the stream from `seed`."""
        self._holder().manual_seed(seed)

    def get_state(self) -> torch.Tensor:
        """Return a copy of the stream's state."""
        return self._holder().get_state()

    def set_state(self, state: torch.Tensor) -> None:
        """Continue the stream from a state of `get_state`."""
        self._holder().set_state(state)

    @contextlib.contextmanager
    def drawn_by_cpu_kernels(self) -> Iterator[None]:
        """Let CPU kernels draw from this stream; the host's stream does not advance meanwhile."""
        if self._lent:
            yield
            return
        host_state = _HOST.get_state()
        _HOST.set_state(self._parked.get_state())
        self._lent = True
        try:
            yield
        finally:
            self._lent = False
            self._parked.set_state(_HOST.get_state())
            _HOST.set_state(host_state)


def make_tracker_class(device: DeviceStream) -> type[CudaRNGStatesTracker]:
    """Return megatron-core's tracker with a ``fork`` from whose streams CPU kernels draw."""

    class CpuRNGStatesTracker(CudaRNGStatesTracker):
        @contextlib.contextmanager
        @override
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"random state {name!r} was never added to the tracker")
            with device.drawn_by_cpu_kernels():
                outer_name, outer_state = self._current_state_name, device.get_state()
                if outer_name in self.states_:
                    self.states_[outer_name] = outer_state
                device.set_state(self.states_[name])
                self._current_state_name = name
                try:
                    yield
                finally:
                    self.states_[name] = device.get_state()
                    # Read again: a fork of the outer name inside this one has moved its stream.
                    device.set_state(self.states_.get(outer_name, outer_state))
                    self._current_state_name = outer_name

    return CpuRNGStatesTracker


def dropout_from(
    device: DeviceStream, dropout: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Return torch.nn.functional's `dropout` with masks that are drawn from the device's stream."""

    def device_dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0.0:
            return dropout(input, p, training, inplace)
        with device.drawn_by_cpu_kernels():
            return dropout(input, p, training, inplace)

    return device_dropout
