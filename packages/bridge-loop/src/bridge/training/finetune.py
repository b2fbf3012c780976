"""Fine-tuning: the run of `bridge.training.pretrain`, from weights that were trained before."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bridge.training.callbacks import Callbacks
from bridge.training.config import CheckpointConfig, ConfigContainer
from bridge.training.pretrain import TrainResult, carry_out
from bridge.training.run_files.directory import RunDirectory, find_checkpoint
from bridge.training.usage_error import UsageError


def finetune(
    config: ConfigContainer,
    forward_step_func: Callable[..., Any],
    callbacks: Sequence[object] | None = None,
    *,
    on_failure: Callable[[BaseException, str], None] | None = None,
    resume_line: Callable[[Path], str] | None = None,
) -> TrainResult:
    """Train a model further, from the weights in ``checkpoint.pretrained_checkpoint``.

    That is a run's directory or one of its checkpoints; nothing but the weights is taken from it. A
    run that is resumed continues from its own latest checkpoint. Everything else is as in
    `bridge.training.pretrain.pretrain`.

    Args:
        config: The run; it is not changed. Its model must be the one that was trained.
        forward_step_func: As for `pretrain`.
        callbacks: As for `pretrain`.
        on_failure: As for `pretrain`.
        resume_line: As for `pretrain`.

    Raises:
        ConfigError: The configuration has problems; the message lists all of them.
        UsageError: There is no checkpoint to start from, or it does not fit the model; or the data
            or the run directory does not fit.
    """
    listeners = Callbacks(callbacks)
    _reject_random_weights(config.checkpoint)
    return carry_out("finetune", config, forward_step_func, listeners, on_failure, resume_line)


def _reject_random_weights(checkpoint: CheckpointConfig) -> None:
    if checkpoint.resume and checkpoint.run_dir is not None:
        # The weights that the run started from are not needed any more.
        if RunDirectory(Path(checkpoint.run_dir)).checkpoint_to_resume(checkpoint.step):
            return
    if checkpoint.pretrained_checkpoint is None:
        raise UsageError(
            "checkpoint.pretrained_checkpoint: fine-tuning needs weights to start from; give a "
            "run's directory or one of its checkpoints"
        )
    find_checkpoint(checkpoint.pretrained_checkpoint, "checkpoint.pretrained_checkpoint")
