"""The startup messages of a run: ranks, layout, model, data, where it continues."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.training.config import ConfigContainer
from bridge.training.contracts import DrawsLayout
from bridge.training.data.run_data import RunData
from bridge.training.data.run_length import samples_until
from bridge.training.model.building import count_parameters
from bridge.training.ranks.groups import Ranks
from bridge.training.state import TrainState

if TYPE_CHECKING:
    from bridge.training.components import TrainingParts


def describe_run(parts: "TrainingParts") -> Iterator[str]:
    """Yield lines about a run: its ranks, model and data, and where it continues."""
    config, ranks, data, counters = parts.config, parts.ranks, parts.data, parts.state.train_state
    yield _describe_ranks(config, ranks)
    if isinstance(config.model, DrawsLayout):
        picture = config.model.layout_picture(ranks.layout.world_size)
        yield from [] if picture is None else picture.splitlines()
    yield f"model {count_parameters(parts.model):,} parameters on this rank"
    yield _describe_training_data(config, data, counters)
    yield from data.warnings
    sets = {**data.sets("validation"), **data.sets("test")}
    if sets and config.validation.eval_iters != 0:
        drawn = ", ".join(
            f"{name} {data.evaluation_samples(dataset):,} of {len(dataset):,}"
            for name, dataset in sets.items()
        )
        yield f"evaluates {drawn} samples"
    if config.validation.eval_at_start and not data.sets("validation"):
        yield (
            "warning: validation.eval_at_start=true: has no effect, as the dataset has no "
            "validation data; leave it out, or give some"
        )
    if parts.restored_from is not None:
        yield f"continues after step {counters.step}, from {parts.restored_from}"
        # A run that is finished takes no step at another rate.
        if counters.step < data.train_iters:
            yield from (f"warning: {change}" for change in parts.changes)
    elif config.checkpoint.resume:
        yield "the run has no checkpoint yet: it starts again at step 0"


def _describe_ranks(config: ConfigContainer, ranks: Ranks) -> str:
    layout = ranks.layout
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
    return (
        f"device {ranks.device}, {config.mixed_precision.precision}, "
        f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
        + (f" ({sizes})" if sizes else "")
    )


def _describe_training_data(config: ConfigContainer, data: RunData, counters: TrainState) -> str:
    batch = config.train.global_batch_size
    samples = samples_until(data.train_iters, config.train, counters)
    # Steps of another batch size came before.
    is_changed = counters.consumed_train_samples != counters.step * batch
    notes = "".join(f", {value:,} {key}" for key, value in data.splits.notes.items())
    return (
        f"data {samples / len(data.splits.train or []):.3g} epochs: {data.train_iters} "
        f"steps of {batch} samples"
        + (f" from step {counters.step + 1} on" if is_changed else "")
        + notes
    )
