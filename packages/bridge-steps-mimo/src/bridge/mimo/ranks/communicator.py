"""Communication between modules on separate ranks, whose numbers of replicas may differ."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, override

import torch

from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import bridge_batch_dimension, mark_split_sizes

with quiet_import():
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator, CommRole
    from megatron.core.pipeline_parallel.multimodule_communicator import (
        MultiModulePipelineCommunicator,
    )


class ModuleCommunicator(MultiModulePipelineCommunicator):
    """megatron-core's communicator, with our bridges between the modules."""

    @override
    def _build_bridge_comms(self) -> None:
        for source, targets in self.topology.items():
            for target in targets:
                bridge = _Bridge(
                    self.module_to_grid_map[source],
                    self.module_to_grid_map[target],
                    dim_mapping=self.dim_mapping,
                    comm_dtype=self.config.pipeline_dtype,
                    src_module_name=source,
                    dest_module_name=target,
                    tensor_ndim=self.module_output_ndim[source],
                )
                self.bridge_comms.append(bridge)


class _Bridge(BridgeCommunicator):
    """megatron-core's bridge, for encoders with more replicas than the language model.

    A replica of the language model then concatenates the embeddings of several encoder ranks, which
    may differ in their number of tokens, and sends each rank the gradients of its embeddings.
    megatron-core would split the gradients into equal parts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Sizes of the parts of each microbatch whose gradients are not sent yet, oldest first.
        self._received: deque[list[int]] = deque()
        self._trains = False
        super().__init__(*args, **kwargs)

    @override
    def recv_forward(self) -> torch.Tensor:
        """Receive the embeddings of a microbatch."""
        return self._receive(super().recv_forward)

    @override
    def send_backward(self, grad_tensor: torch.Tensor) -> None:
        """Send each rank the gradients of its embeddings."""
        self._mark(grad_tensor)
        super().send_backward(grad_tensor)

    @override
    def send_backward_recv_forward(
        self, grad_tensor: torch.Tensor, forward_shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Send each rank the gradients of its embeddings; receive those of another microbatch."""
        self._mark(grad_tensor)
        return self._receive(partial(super().send_backward_recv_forward, grad_tensor))

    def _receive(self, receive: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._trains = torch.is_grad_enabled()
        # The graph ends at the received tensor: torch has no gradient of a broadcast, and warns.
        with torch.no_grad():
            received = receive()
        return received.detach().requires_grad_(self._trains)

    @override
    def _communicate_shapes(self, *args: Any, **kwargs: Any) -> Any:
        forward, backward = super()._communicate_shapes(*args, **kwargs)
        if forward and self._trains:
            dimension = bridge_batch_dimension(self)
            self._received.append([shape[dimension] for shape in forward])
        return forward, backward

    def _mark(self, gradient: torch.Tensor) -> None:
        if self.comm_map[self.current_rank].role is CommRole.RECEIVER:
            mark_split_sizes(gradient, self._received.popleft())
