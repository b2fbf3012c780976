"""Adam for CPU tensors, with the state that megatron-core's distributed optimizer expects."""

from collections.abc import Callable, Iterable
from typing import Any, override

import torch
from torch.optim.adam import adam

from bridge.training.usage_error import UsageError


class FusedAdam(torch.optim.Optimizer):
    """Adam with the state of Transformer Engine's: ``step`` is an int of the parameter group.

    Where neither Transformer Engine nor Apex is installed, megatron-core uses torch's AdamW and
    cannot resume (optimizer/distrib_optimizer.py): loading fails on an assertion for a new
    optimizer; a "step" is looked up that was not saved; and all parameters share one step tensor,
    which AdamW advances once for each parameter. With this class none of it happens, and
    checkpoints have the same layout as on a GPU.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise UsageError("optimizer.optimizer_cuda_graph needs a GPU; turn it off on a CPU")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": True,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, by torch's fused CPU kernel."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None and p.numel()]
        if not params:
            return
        states = [self._state_of(p) for p in params]
        beta1, beta2 = group["betas"]
        # torch's kernel advances each step tensor in place, so each parameter needs its own.
        steps = torch.full((len(params),), float(group["step"] - 1)).unbind()
        adam(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            list(steps),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.adam_w_mode,
        )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
