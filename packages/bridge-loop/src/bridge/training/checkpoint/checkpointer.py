"""Checkpoints by megatron-core's dist_checkpointing, and the order of writes that makes them safe.

A checkpoint is written next to its final name, made durable, renamed, and only then named by
`latest`. So whenever the process dies, `latest` names a complete checkpoint or is absent. Older
ones are removed only after the newer one is named.

A checkpoint holds the model, the optimizer, the LR scheduler, every rank's random-number states and
mean of recent losses, the counters of TrainState (the data's position is one of them), the newest
metrics and the resolved configuration. The optimizer is saved fully reshardable, so that another
layout can read it. Where adapters are trained, the model is the adapters alone, with the identity
of their base.

Our own state that is no tensor goes to run_state.json. megatron-core pickles the rest (settings of
the optimizer's groups, random-number states). Reading, and loading the model from it, takes place
within `restricted_loading`, which unpickles listed types alone.
"""

import dataclasses
import json
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bridge.training.checkpoint.base import Base
from bridge.training.checkpoint.manifest import (
    FileRecord,
    record_files,
    without_abandoned,
    write_manifest,
    written_by,
)
from bridge.training.checkpoint.megatron_io import extra_states, load_sharded, save_sharded, saving
from bridge.training.checkpoint.model_weights import load_model_weights, named_chunks
from bridge.training.checkpoint.resume_rules import (
    optimizer_kind,
    reject_another_optimizer,
    reject_other_data,
)
from bridge.training.checkpoint.run_state import (
    EVALUATIONS,
    FORMAT_VERSION,
    RUN_STATE,
    format_version,
    read_common,
    saved_counters,
    saved_results,
    write_evaluations,
)
from bridge.training.checkpoint.safe_loading import restricted_loading
from bridge.training.config import ConfigContainer
from bridge.training.durable_files import sync_directory, sync_tree
from bridge.training.loss.anomalies import LossWatch
from bridge.training.model.ddp import parameters_in_sync, without_ddp
from bridge.training.model.frozen import load_trained, only_trained
from bridge.training.optimizer.saved_state import (
    fit_to,
    is_shifted,
    let_sgd_be_loaded,
    make_state,
    offsets_without_padding,
    take_saved_rates,
)
from bridge.training.optimizer.scheduler import resume_scheduler, scheduler_state
from bridge.training.ranks.collectives import from_every_rank, largest_of_all, on_first_rank
from bridge.training.ranks.groups import Ranks
from bridge.training.ranks.launcher_store import is_logging_rank, rank, world_size
from bridge.training.ranks.seeding import random_state, restore_random_state
from bridge.training.run_files.configuration import write_config
from bridge.training.run_files.directory import RunDirectory, step_of
from bridge.training.state import GlobalState
from bridge.training.usage_error import UsageError

_PARTIAL = ".partial"


@dataclasses.dataclass(kw_only=True, frozen=True)
class SavedRun:
    """The components of a run whose state is in its checkpoints."""

    config: ConfigContainer
    """The resolved configuration, written into every checkpoint."""
    model: list[Any]
    """This rank's model chunks, DDP-wrapped."""
    optimizer: Any
    """megatron-core's optimizer."""
    scheduler: Any
    """megatron-core's LR scheduler."""
    state: GlobalState
    """The counters and the newest metrics."""
    data_fingerprint: str
    """The name of the order of the training samples."""
    watch: LossWatch
    """The mean of recent losses, by which spikes are found."""
    base: Base | None = None
    """The base weights, where the run trains adapters; None if it trains the model."""


class Checkpointer:
    """Saves and restores one run."""

    def __init__(self, run: SavedRun, directory: RunDirectory, ranks: Ranks) -> None:
        """Save a run.

        Args:
            run: The components whose state is saved.
            directory: The run's files.
            ranks: The process groups.
        """
        self._run = run
        self._directory = directory
        self._ranks = ranks
        self._last_saved: int | None = None
        self.before_first_save: Callable[[], object] | None = None
        """Called on rank 0 when the run is about to write for the first time."""
        let_sgd_be_loaded(run.optimizer)

    def save(self) -> Path | None:
        """Save the present state; return the checkpoint, or None if this step is saved already.

        A collective over all ranks.
        """
        step, group = self._step, self._ranks.control_group
        if step == self._last_saved:
            return None
        self._run.state.token_counter.gather()
        final = self._directory.checkpoint(step)
        partial = final.with_name(final.name + _PARTIAL)
        try:
            on_first_rank(lambda: self._prepare(partial), group)
            with parameters_in_sync(self._run.model), saving(self._directory):
                state = self._sharded_state(is_loading=False, with_state_of_ranks=True)
                save_sharded(state, partial, self._content(), group)
                own = record_files(written_by(partial, rank()))
            records = dict(ChainMap(*from_every_rank(own, group)))
            on_first_rank(lambda: self._publish(partial, final, records), group)
        except OSError:
            if is_logging_rank():
                # On a full disk it would take the room of the next writes.
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._last_saved = step
        return final

    def save_evaluations(self) -> None:
        """Add the newest evaluations to the checkpoint of this step, if it is saved already.

        The evaluation at the end of a run comes after its last checkpoint.
        """
        if self._step != self._last_saved:
            return
        path = self._directory.checkpoint(self._step) / EVALUATIONS

        def write() -> None:
            with saving(self._directory):
                write_evaluations(path, self._run.state.results)

        on_first_rank(write, self._ranks.control_group)

    def restore(self, checkpoint: Path) -> list[str]:
        """Continue from a checkpoint of this run: everything that `save` wrote comes back.

        Returns:
            A line for each rate that jumps, as the configuration changed.

        Raises:
            UsageError: The checkpoint belongs to another model or another order of the data.
        """
        common = read_common(checkpoint)
        reject_other_data(checkpoint, common, self._run.data_fingerprint)
        reject_another_optimizer(checkpoint, common, self._run.config)
        # In another number of ranks each starts its random streams and mean of losses anew.
        same_ranks = common["world_size"] == world_size()
        state = load_sharded(
            checkpoint, self._sharded_state(is_loading=True, with_state_of_ranks=same_ranks)
        )
        with restricted_loading(checkpoint, extra_states(state)):
            self._load_model(state)
        if format_version(common) < 2:
            self._reject_shifted_optimizer(checkpoint, state["optimizer"])
        self._load_optimizer(state["optimizer"], common["scheduler"])
        counters = self._run.state.train_state
        counters.load_state_dict(saved_counters(common))
        changes = resume_scheduler(
            self._run.scheduler, common["scheduler"], self._run.config, counters
        )
        if same_ranks:
            self._restore_state_of_rank(state[_rng_key()])
        # All ranks must skip the same evaluations.
        self._run.state.results = on_first_rank(
            lambda: saved_results(checkpoint, common), self._ranks.control_group
        )
        self._last_saved = self._step
        return changes

    def load_weights(self, checkpoint: Path) -> None:
        """Take the model's weights from a checkpoint, and nothing else.

        The optimizer's float32 copies follow, else its first step would bring the old ones back.
        """
        load_model_weights(
            [without_ddp(chunk) for chunk in self._run.model], checkpoint, self._ranks
        )
        self._run.optimizer.reload_model_params()

    @property
    def _step(self) -> int:
        return self._run.state.train_state.step

    def _prepare(self, partial: Path) -> None:
        """Make the checkpoint's folder under its temporary name, on rank 0."""
        if self.before_first_save is not None:
            self.before_first_save()
            self.before_first_save = None
        with saving(self._directory):
            self._directory.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self._directory.checkpoints.glob(f"*{_PARTIAL}"):
                shutil.rmtree(leftover)
            partial.mkdir()

    def _publish(self, partial: Path, final: Path, records: Mapping[str, FileRecord]) -> None:
        """Complete the folder, make it durable, rename it, and let `latest` name it; on rank 0."""
        run = self._directory
        with saving(run):
            write_config(partial / "config.yaml", self._run.config)
            (partial / RUN_STATE).write_text(json.dumps(self._run_state(), indent=2) + "\n")
            write_manifest(partial, step=step_of(final), metrics=run.metrics, known=records)
            sync_tree(partial)
            if final.exists():
                # Left by a run that died after the rename and before `latest` was replaced.
                shutil.rmtree(final)
            partial.rename(final)
            for folder in (run.checkpoints, run.path, run.path.parent):
                sync_directory(folder)
            run.publish(final)
            self._remove_old()

    def _load_model(self, state: Mapping[str, Any]) -> None:
        for name, chunk in self._named_chunks().items():
            if self._run.base is None:
                chunk.load_state_dict(state[name])
            else:
                load_trained(chunk, state.get(name, {}))

    def _restore_state_of_rank(self, state: Mapping[str, Any]) -> None:
        restore_random_state(state)
        # Checkpoints of an older form have none.
        if "loss_watch" in state:
            self._run.watch.load_state_dict(state["loss_watch"])

    def _reject_shifted_optimizer(self, checkpoint: Path, state: Any) -> None:
        optimizer = self._run.optimizer
        shifted = is_shifted(optimizer, fit_to(optimizer, state))
        if largest_of_all(int(shifted), self._ranks.control_group):
            raise UsageError(
                f"{checkpoint}: its optimizer state belongs to other weights, as it was once saved "
                "where gradient buckets have padding; its weights are intact: start a new run from "
                f"them with checkpoint.pretrained_checkpoint={checkpoint} (the command: "
                "bridge finetune RECIPE --from CHECKPOINT)"
            )

    def _load_optimizer(self, state: Any, schedule: Mapping[str, Any]) -> None:
        """Load the optimizer's state, and keep the settings that this start was configured with.

        megatron-core finds a parameter group by its learning rates among other things, and takes
        all of its settings from the checkpoint.
        """
        groups = self._run.optimizer.param_groups
        wanted = [{**group, "params": None} for group in groups]
        take_saved_rates(
            groups, state, saved=schedule["max_lr"], present=self._run.scheduler.max_lr
        )
        self._run.optimizer.load_state_dict(fit_to(self._run.optimizer, state))
        for group, settings in zip(self._run.optimizer.param_groups, wanted, strict=True):
            group.update(
                (name, value) for name, value in settings.items() if name not in ("params", "step")
            )

    def _named_chunks(self) -> dict[str, Any]:
        return named_chunks([without_ddp(chunk) for chunk in self._run.model])

    def _content(self) -> dict[str, Any]:
        return {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            # A tensor of all layers or experts together would have holes where none is adapted.
            "singleton_local_shards": self._run.base is not None,
            "chained_optim_avoid_prefix": True,
        }

    def _metadata(self) -> dict[str, Any]:
        return {**self._content(), "dp_cp_group": self._ranks.model.groups.dp_cp}

    def _model_state(self) -> dict[str, Any]:
        states = {
            name: chunk.sharded_state_dict(metadata=self._metadata())
            for name, chunk in self._named_chunks().items()
        }
        if self._run.base is not None:
            return {name: only_trained(state) for name, state in states.items()}
        return states

    def _sharded_state(self, *, is_loading: bool, with_state_of_ranks: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        state = self._model_state()
        if not is_loading:
            make_state(self._run.optimizer)
        with offsets_without_padding(self._run.optimizer):
            # It finds its parameters in the chunks' dictionaries, of one chunk or of many.
            state["optimizer"] = self._run.optimizer.sharded_state_dict(
                dict(state) if len(self._run.model) > 1 else state["model"],
                is_loading=is_loading,
                metadata=self._metadata(),
            )
        if with_state_of_ranks:
            of_rank = {**random_state(), "loss_watch": self._run.watch.state_dict()}
            state[_rng_key()] = ShardedObject(
                "rng", of_rank, (world_size(),), (rank(),), replica_id=0
            )
        return state

    def _run_state(self) -> dict[str, Any]:
        """Return the content of run_state.json, which is the same on all ranks."""
        state = {
            "format_version": FORMAT_VERSION,
            "scheduler": scheduler_state(self._run.scheduler, self._run.config),
            "train_state": dataclasses.asdict(self._run.state.train_state),
            "data_fingerprint": self._run.data_fingerprint,
            "world_size": world_size(),
            "optimizer": optimizer_kind(self._run.config),
            "results": dataclasses.asdict(self._run.state.results),
        }
        return state if self._run.base is None else {**state, "base": self._run.base.record()}

    def _remove_old(self) -> None:
        keep = self._run.config.checkpoint.keep_last
        # Later steps are of an earlier course of the run, which was resumed from before them.
        known = [path for path in self._directory.saved() if step_of(path) <= self._step]
        for old in without_abandoned(known)[:-keep] if keep else []:
            shutil.rmtree(old)


def _rng_key() -> str:
    return f"rng_{rank()}"
