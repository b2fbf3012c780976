"""megatron-core's optimizer over modules on separate ranks, without host-device syncs.

The gradients of each module are clipped by the norm of all modules' gradients.
"""

import math
from typing import Any, override

import torch
import torch.distributed as dist

from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import optimizers_of_modules

with quiet_import():
    from megatron.core.models.mimo.optimizer import MimoOptimizer
    from megatron.core.optimizer import clip_grads


class ModulesOptimizer(MimoOptimizer):
    """megatron-core's MimoOptimizer for float32 and bf16, in which no gradient overflows.

    So no rank needs the others' state before its step. Where the kernels allow it (as with one
    module), there is no host-device sync for the norm either.
    """

    @torch.no_grad()
    @override
    def get_grad_norm(self) -> Any:
        """Return the L2 norm of the gradients of all modules, on the device where possible."""
        squares = torch.zeros(
            len(self.module_infos), device=torch.cuda.current_device(), dtype=torch.float32
        )
        for index, (_, info) in enumerate(sorted(self.module_infos.items())):
            if info.optimizer is not None:
                squares[index : index + 1] = info.optimizer.get_grad_norm() ** 2
        # A module's ranks have the same number, and the others 0.
        dist.all_reduce(squares, op=dist.ReduceOp.MAX)
        norm = squares.sum(dim=0, keepdim=True).sqrt()
        return norm if clip_grads.multi_tensor_scale_tensor_impl is not None else norm.item()

    @torch.no_grad()
    @override
    def step(self) -> tuple[bool, Any, int | None]:
        """Clip by the norm of all gradients and step, unless the norm is too large.

        Returns:
            Whether the step was taken (optimizer.grad_norm_skip_threshold), the norm, and the
            number of zeros with optimizer.log_num_zeros_in_grad.
        """
        self.prepare_grads()
        norm = self.get_grad_norm()
        threshold = self.config.grad_norm_skip_threshold
        # Without a threshold there is no host-device sync for the norm.
        if math.isfinite(threshold) and norm > threshold:
            return False, norm, None
        for optimizer in optimizers_of_modules(self):
            parameters: list[torch.Tensor] = list(optimizer.get_parameters())
            if parameters and self.config.clip_grad > 0.0:
                clip_grads.clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=self.config.clip_grad,
                    total_norm=norm,
                    use_decoupled_grad=self.config.use_precision_aware_optimizer,
                )
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        self.step_with_ready_grads()
        return True, norm, zeros
