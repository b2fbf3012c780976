"""The lines that introduce a run: ranks, layout, model, data, where it continues."""

from typing import TYPE_CHECKING

from bridge.training.contracts import DrawsLayout
from bridge.training.model.building import count_parameters

if TYPE_CHECKING:
    from bridge.training.run import Run


def introduce(run: "Run") -> None:
    """Say what the run is and where it continues."""
    layout, train = run.ranks.layout, run.config.train
    sizes = ", ".join(
        f"{name} {size}"
        for name, size in (
            ("tensor", layout.tensor),
            ("pipeline", layout.pipeline),
            ("virtual pipeline", layout.virtual_pipeline or 1),
            ("context", layout.context),
            ("expert", layout.expert),
            ("data", layout.data),
        )
        if size > 1
    )
    done = run.state.train_state
    left = run.data.train_iters - done.step
    samples = done.consumed_train_samples + left * train.global_batch_size
    other_batches = done.consumed_train_samples != done.step * train.global_batch_size
    notes = "".join(f", {value:,} {key}" for key, value in run.data.splits.notes.items())
    progress = run.progress
    progress.note(
        f"device {run.ranks.device}, {run.config.mixed_precision.precision}, "
        f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
        + (f" ({sizes})" if sizes else "")
    )
    drawn = None
    if isinstance(run.config.model, DrawsLayout):
        drawn = run.config.model.layout_picture(layout.world_size)
    for line in [] if drawn is None else drawn.splitlines():
        progress.note(line)
    progress.note(f"model {count_parameters(run.model):,} parameters on this rank")
    progress.note(
        f"data {samples / len(run.data.splits.train or []):.3g} epochs: {run.data.train_iters} "
        f"steps of {train.global_batch_size} samples"
        + (f" from step {done.step + 1} on" if other_batches else "")
        + notes
    )
    for warning in run.data.warnings:
        progress.note(warning)
    sets = {**run.data.sets("validation"), **run.data.sets("test")}
    if sets and run.config.validation.eval_iters != 0:
        drawn = ", ".join(
            f"{name} {run.data.evaluation_samples(dataset):,} of {len(dataset):,}"
            for name, dataset in sets.items()
        )
        progress.note(f"evaluates {drawn} samples")
    if run.restored_from is not None:
        step = run.state.train_state.step
        progress.note(f"continues after step {step}, from {run.restored_from}")
        # A run that is finished takes no step at another rate.
        for change in run.changes if left else []:
            progress.note(f"warning: {change}")
    elif run.config.checkpoint.resume:
        progress.note("the run has no checkpoint yet: it starts again at step 0")
