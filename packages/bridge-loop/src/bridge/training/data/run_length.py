"""The length of a run: from steps, samples or epochs, and from its counters so far.

The global batch size may differ from that of the steps so far. A run over samples or epochs ends
after its number of samples all the same, a run over steps after its number of steps.
"""

import math

from bridge.training.config import TrainConfig
from bridge.training.state import TrainState
from bridge.training.usage_error import UsageError


def samples_to_draw(train: TrainConfig, done: TrainState) -> int | None:
    """Return the samples that a run draws from its beginning to its end; None for epochs.

    Raises:
        UsageError: The run has done more already.
    """
    if train.train_samples is not None:
        return train.train_samples
    if train.train_iters is None:
        return None
    return samples_until(_reachable_step(train, done), train, done)


def samples_until(step: int, train: TrainConfig, done: TrainState) -> int:
    """Return the samples that a run draws from its beginning to a step that is not done yet."""
    return done.consumed_train_samples + (step - done.step) * train.global_batch_size


def last_step(train: TrainConfig, size: int, done: TrainState) -> int:
    """Return the step after which a run ends.

    Args:
        train: The section; exactly one of its three lengths is given.
        size: Samples of the training data.
        done: The counters of the run.

    Raises:
        UsageError: The run has done more already, or the remaining samples are no multiple of the
            global batch size.
    """
    if train.train_iters is not None:
        return _reachable_step(train, done)
    drawn, batch = done.consumed_train_samples, train.global_batch_size
    if train.train_samples is not None:
        left = train.train_samples - drawn
        if left < 0:
            raise UsageError(
                f"train.train_samples={train.train_samples}: the run has drawn {drawn} samples "
                f"already; give at least {drawn}"
            )
        if left % batch:
            raise UsageError(
                f"train.global_batch_size={batch}: {left} of train.train_samples="
                f"{train.train_samples} are left, which is not a multiple; give a batch size that "
                f"divides {left}, or train.train_samples={drawn + math.ceil(left / batch) * batch}"
            )
        return done.step + left // batch
    assert train.epochs is not None
    left = train.epochs * size - drawn
    if left < 0:
        raise UsageError(
            f"train.epochs={train.epochs}: {train.epochs} passes over {size} samples are less than "
            f"the {drawn} samples that the run has drawn already; give more"
        )
    if not done.step and left < batch:
        raise UsageError(
            f"train.epochs: {train.epochs} passes over {size} samples are less than one step "
            f"of train.global_batch_size={batch}; lower the batch size"
        )
    return done.step + left // batch


def schedule_samples(train: TrainConfig, size: int, done: TrainState) -> int:
    """Return the length of the LR schedule, in samples.

    In a run over steps they are those of all steps at the present batch size
    (`bridge.training.optimizer.scheduler.resume_scheduler`), otherwise those that are drawn from
    beginning to end.
    """
    if train.train_iters is not None:
        return train.train_iters * train.global_batch_size
    return samples_until(last_step(train, size, done), train, done)


def _reachable_step(train: TrainConfig, done: TrainState) -> int:
    """Return train.train_iters, unless the run has come further already."""
    assert train.train_iters is not None
    if done.step > train.train_iters:
        raise UsageError(
            f"train.train_iters={train.train_iters}: the run has taken {done.step} steps already; "
            f"give at least {done.step}"
        )
    return train.train_iters
