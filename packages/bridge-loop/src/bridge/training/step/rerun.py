"""megatron-core's rerun state machine: repeat a suspicious step to find faulty hardware.

It is off by default, since validating every loss is a host-device sync. When a validation fails,
the step is run again on the same data. The machine then asks for a checkpoint and another start on
other hardware, with an exit code for the launcher (16: only a continued run can decide, 17: the
result is wrong). A loss that is not finite fails the validation too, whatever train.nan_action is.
"""

from collections.abc import Iterator
from typing import Any

import torch

from bridge.training.config import ConfigContainer


class RerunRequest(RuntimeError):
    """A request of the rerun state machine to end the run with `exit_code` and start it again.

    The optimizer's step was not taken. `checkpoint` says whether to save the state before it.
    """

    def __init__(self, exit_code: int, *, checkpoint: bool) -> None:
        super().__init__(
            f"the rerun state machine found a result that must be checked again (exit code "
            f"{exit_code}); continue the run with --resume, on other devices"
        )
        self.exit_code = exit_code
        self.checkpoint = checkpoint


def start_rerun_machine(config: ConfigContainer) -> None:
    """Start megatron-core's machine in the configured mode; it replaces the program's own."""
    from megatron.core import rerun_state_machine
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    rerun_state_machine.destroy_rerun_state_machine()
    rerun_state_machine.initialize_rerun_state_machine(
        # A repetition must draw the same dropout, and the machine saves only torch's streams.
        state_save_func=lambda: get_cuda_rng_tracker().get_states(),
        state_restore_func=lambda states: get_cuda_rng_tracker().set_states(states),
        mode=rerun_state_machine.RerunMode(config.rerun.rerun_mode),
    )


def make_rewindable(config: ConfigContainer, iterators: list[Any]) -> list[Any]:
    """Return iterators that let a repeated step draw the same data again, if steps may repeat."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    if config.rerun.rerun_mode == "disabled":
        return iterators
    return [RerunDataIterator(iterator) for iterator in iterators]


def attempts(config: ConfigContainer, iterators: list[Any]) -> Iterator[None]:
    """Yield once for each forward and backward pass of the step."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    if config.rerun.rerun_mode == "disabled":
        yield
        return
    machine = get_rerun_state_machine()
    while machine.should_run_forward_backward(iterators):
        yield


def check_loss(loss: torch.Tensor) -> None:
    """Validate a microbatch's loss; a host-device sync.

    Losses of an evaluation are not validated, as the machine can repeat only training steps.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    if not torch.is_grad_enabled():
        return
    get_rerun_state_machine().validate_result(
        result=loss,
        rejection_func=lambda value: not torch.isfinite(torch.as_tensor(value)).all(),
        message="a loss that is not finite",
        tolerance=0.0,
        fatal=True,
    )


def raise_if_suspicious(config: ConfigContainer) -> None:
    """Raise if the machine asks for the end of the run; call it before the optimizer's step.

    Raises:
        RerunRequest: On every rank. The random-number streams are those before the step.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    if config.rerun.rerun_mode == "disabled":
        return
    checkpoint, leave, exit_code = get_rerun_state_machine().should_checkpoint_and_exit()
    if leave:
        raise RerunRequest(exit_code, checkpoint=bool(checkpoint))
