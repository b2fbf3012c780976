"""Checkpoints by megatron-core's dist_checkpointing, and the order of writes that makes them safe.

A checkpoint is written beside its final name, made durable, renamed, and only then named by
`latest`. So whenever the process dies, `latest` names a whole checkpoint or is absent. Older ones
go only after the newer one is named.

What is saved: model, optimizer, schedule, every rank's random-number states and mean of recent
losses, the counters of TrainState (the data's position is one of them) and the resolved
configuration. The optimizer is
saved fully reshardable, so that another layout can read it. Of a run that trains adapters the model
is the adapters alone, and which weights they stand beside.

What is no tensor and ours goes to run_state.json. megatron-core pickles what remains (settings of
the optimizer's groups, random-number states). All reading, and giving to the model what was read,
takes place within `restricted_loading`, which unpickles listed types alone.
"""

import contextlib
import dataclasses
import json
import logging
import random
import shutil
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bridge.training.base_checkpoint import Base
from bridge.training.checkpoint_manifest import (
    FileRecord,
    of_this_course,
    record_files,
    refuse_missing_manifest,
    write_manifest,
    written_by,
)
from bridge.training.checkpoint_writing import save_sharded, saving
from bridge.training.collectives import from_every_rank, on_first_rank
from bridge.training.config import ConfigContainer
from bridge.training.distributed import Ranks, is_logging_rank, rank, world_size
from bridge.training.durable_files import sync_directory, sync_tree
from bridge.training.loss_watch import LossWatch
from bridge.training.model_building import parameters_in_sync, without_ddp
from bridge.training.optimization import resume_schedule, schedule_state
from bridge.training.optimizer_state import (
    fitted_to,
    is_shifted,
    let_sgd_be_loaded,
    make_state,
    offsets_without_padding,
    take_saved_rates,
)
from bridge.training.run_directory import RunDirectory, step_of
from bridge.training.run_files import write_config
from bridge.training.safe_loading import restricted_loading
from bridge.training.state import TrainState
from bridge.training.trainable import load_trained, only_trained
from bridge.training.usage_error import UsageError

_logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Of the checkpoints that are saved, under the key ``format_version``.

1 (without the key): the state of a distributed optimizer with padding between its gradient buckets
  is that of other weights.
2: it is that of each weight.
"""
_PARTIAL = ".partial"
_RUN_STATE = "run_state.json"
_WARNINGS_OF_READING = (
    r"torch\.distributed is disabled, unavailable",
    "The argument order of load has been changed",
    "Please use DTensor instead",
)


class Checkpointer:
    """Saves and restores one run.

    Args:
        directory: The run's files.
        config: The resolved configuration, written into every checkpoint.
        ranks: The process groups.
        model: This rank's model chunks, DDP-wrapped.
        optimizer: megatron-core's optimizer.
        scheduler: megatron-core's schedule.
        train_state: The run's counters.
        data_fingerprint: Names the order of the training samples.
        loss_watch: Holds the mean that spikes of the loss are measured by.
        base: The frozen weights that the run trains adapters beside; None if it trains the model.
    """

    def __init__(  # noqa: PLR0913  # all that a checkpoint holds
        self,
        *,
        directory: RunDirectory,
        config: ConfigContainer,
        ranks: Ranks,
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        train_state: Any,
        data_fingerprint: str,
        loss_watch: LossWatch,
        base: Base | None = None,
    ) -> None:
        self._directory = directory
        self._config = config
        self._ranks = ranks
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._train_state = train_state
        self._data_fingerprint = data_fingerprint
        self._loss_watch = loss_watch
        self._base = base
        self._last_saved: int | None = None
        self.before_first_save: Callable[[], object] | None = None
        """Called on rank 0 when the run is about to write for the first time."""
        let_sgd_be_loaded(optimizer)

    def save(self) -> Path | None:
        """Save the run as it stands; return the checkpoint, or None if this step is saved already.

        A collective over all ranks. The state to be saved is that at the call.
        """
        step, group = self._train_state.step, self._ranks.control_group
        if step == self._last_saved:
            return None
        final = self._directory.checkpoint(step)
        partial = final.with_name(final.name + _PARTIAL)
        try:
            on_first_rank(lambda: self._prepare(partial), group)
            with parameters_in_sync(self._model), saving(self._directory):
                state = self._sharded_state(is_loading=False, with_state_of_ranks=True)
                save_sharded(state, partial, self._content(), group)
                own = record_files(written_by(partial, rank()))
            records = dict(ChainMap(*from_every_rank(own, group)))
            on_first_rank(lambda: self._publish(partial, final, records), group)
        except OSError:
            if is_logging_rank():
                # On a full disk it would be in the way of whatever comes next.
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._last_saved = step
        return final

    def _prepare(self, partial: Path) -> None:
        if self.before_first_save is not None:
            self.before_first_save()
            self.before_first_save = None
        with saving(self._directory):
            self._directory.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self._directory.checkpoints.glob(f"*{_PARTIAL}"):
                shutil.rmtree(leftover)
            partial.mkdir()

    def _publish(self, partial: Path, final: Path, records: Mapping[str, FileRecord]) -> None:
        run = self._directory
        with saving(run):
            write_config(partial / "config.yaml", self._config)
            (partial / _RUN_STATE).write_text(json.dumps(self._run_state(), indent=2) + "\n")
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

    def restore(self, checkpoint: Path) -> list[str]:
        """Continue from a checkpoint of this run: everything that `save` wrote comes back.

        Returns:
            Warnings of what the present configuration makes different.

        Raises:
            UsageError: The checkpoint belongs to another model or another order of the data.
        """
        common = _read_common(checkpoint)
        saved_ranks = common["world_size"]
        self._check_same_data(checkpoint, common["data_fingerprint"])
        self._check_same_optimizer(checkpoint, common)
        # Other ranks have other random streams and losses; each starts its own anew.
        same_ranks = saved_ranks == world_size()
        state = _load(
            checkpoint, self._sharded_state(is_loading=True, with_state_of_ranks=same_ranks)
        )
        with restricted_loading(checkpoint, _extra_states(state)):
            self._load_model(state)
        if _format_version(common) < 2:
            self._reject_shifted_optimizer(checkpoint, state["optimizer"])
        self._load_optimizer(state["optimizer"], common["scheduler"])
        self._train_state.load_state_dict(_counters(common))
        changes = resume_schedule(
            self._scheduler, common["scheduler"], self._config, self._train_state
        )
        if same_ranks:
            of_rank = state[_rng_key()]
            _restore_random_state(of_rank)
            # Checkpoints of an older form have none.
            if "loss_watch" in of_rank:
                self._loss_watch.load_state_dict(of_rank["loss_watch"])
        self._last_saved = self._train_state.step
        return changes

    def load_weights(self, checkpoint: Path) -> None:
        """Take the model's weights from a checkpoint, and nothing else.

        The optimizer's float32 copies follow, else its first step would bring the old ones back.
        """
        load_model_weights([without_ddp(chunk) for chunk in self._model], checkpoint, self._ranks)
        self._optimizer.reload_model_params()

    def _load_model(self, state: Mapping[str, Any]) -> None:
        for index, chunk in enumerate(self._model):
            name, inner = self._chunk_name(index), without_ddp(chunk)
            if self._base is None:
                inner.load_state_dict(state[name])
            else:
                load_trained(inner, state.get(name, {}))

    def _reject_shifted_optimizer(self, checkpoint: Path, state: Any) -> None:
        shifted = torch.tensor(is_shifted(self._optimizer, fitted_to(self._optimizer, state)))
        dist.all_reduce(shifted, op=dist.ReduceOp.MAX, group=self._ranks.control_group)
        if shifted:
            raise UsageError(
                f"{checkpoint}: its optimizer state belongs to other weights, as it was once saved "
                "where gradient buckets have padding; its weights are whole: start a new run from "
                f"them with checkpoint.pretrained_checkpoint={checkpoint} (the command: "
                "bridge finetune RECIPE --from CHECKPOINT)"
            )

    def _load_optimizer(self, state: Any, schedule: Mapping[str, Any]) -> None:
        """Load the optimizer's state, and keep the settings that this start was configured with.

        megatron-core finds a parameter group by its learning rates among other things, and takes
        all of its settings from the checkpoint.
        """
        groups = self._optimizer.param_groups
        wanted = [{**group, "params": None} for group in groups]
        take_saved_rates(groups, state, saved=schedule["max_lr"], present=self._scheduler.max_lr)
        self._optimizer.load_state_dict(fitted_to(self._optimizer, state))
        for group, settings in zip(self._optimizer.param_groups, wanted, strict=True):
            group.update(
                (name, value) for name, value in settings.items() if name not in ("params", "step")
            )

    def _chunk_name(self, index: int) -> str:
        return _chunk_name(index, len(self._model))

    def _content(self) -> dict[str, Any]:
        return {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            # A tensor of all layers or experts together would have holes where none is adapted.
            "singleton_local_shards": self._base is not None,
            "chained_optim_avoid_prefix": True,
        }

    def _metadata(self) -> dict[str, Any]:
        return {**self._content(), "dp_cp_group": self._ranks.own_groups.dp_cp}

    def _model_state(self) -> dict[str, Any]:
        states = {
            self._chunk_name(index): without_ddp(chunk).sharded_state_dict(
                metadata=self._metadata()
            )
            for index, chunk in enumerate(self._model)
        }
        if self._base is not None:
            return {name: only_trained(state) for name, state in states.items()}
        return states

    def _sharded_state(self, *, is_loading: bool, with_state_of_ranks: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        state = self._model_state()
        if not is_loading:
            make_state(self._optimizer)
        with offsets_without_padding(self._optimizer):
            # It finds its parameters in the chunks' dictionaries, of one chunk or of many.
            state["optimizer"] = self._optimizer.sharded_state_dict(
                dict(state) if len(self._model) > 1 else state["model"],
                is_loading=is_loading,
                metadata=self._metadata(),
            )
        if with_state_of_ranks:
            of_rank = {**_random_state(), "loss_watch": self._loss_watch.state_dict()}
            state[_rng_key()] = ShardedObject(
                "rng", of_rank, (world_size(),), (rank(),), replica_id=0
            )
        return state

    def _run_state(self) -> dict[str, Any]:
        """Return what JSON has types for, of all ranks alike."""
        state = {
            "format_version": FORMAT_VERSION,
            "scheduler": schedule_state(self._scheduler, self._config),
            "train_state": dataclasses.asdict(self._train_state),
            "data_fingerprint": self._data_fingerprint,
            "world_size": world_size(),
            "optimizer": self._kind_of_optimizer(),
        }
        return state if self._base is None else {**state, "base": self._base.record()}

    def _check_same_data(self, checkpoint: Path, saved: str) -> None:
        if saved != self._data_fingerprint:
            raise UsageError(
                f"{checkpoint}: the run was trained on data in the order {saved!r}; the present "
                f"configuration draws {self._data_fingerprint!r}. Undo the overrides of dataset.*, "
                "rng.seed or train.train_iters, or start a new run with "
                "checkpoint.pretrained_checkpoint"
            )

    def _kind_of_optimizer(self) -> dict[str, Any]:
        """Return the settings that decide what an optimizer's state consists of."""
        return {
            "optimizer.optimizer": self._config.optimizer.optimizer,
            "ddp.use_distributed_optimizer": self._config.ddp.use_distributed_optimizer,
        }

    def _check_same_optimizer(self, checkpoint: Path, common: Mapping[str, Any]) -> None:
        # Checkpoints of an older form do not say it.
        saved = common.get("optimizer", {})
        for field, value in self._kind_of_optimizer().items():
            if saved.get(field, value) != value:
                raise UsageError(
                    f"{field}={_shown(value)}: {checkpoint} has the optimizer state of "
                    f"{field}={_shown(saved[field])}; leave it so, or start a new run from its "
                    f"weights with checkpoint.pretrained_checkpoint={checkpoint}"
                )

    def _remove_old(self) -> None:
        keep, step = self._config.checkpoint.keep_last, self._train_state.step
        # Later steps are those of a run that went on from here before; they do not count.
        known = [path for path in self._directory.saved() if step_of(path) <= step]
        for old in of_this_course(known)[:-keep] if keep else []:
            shutil.rmtree(old)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def refuse_another_base(checkpoint: Path, base: Base | None) -> None:
    """Refuse to go on with adapters beside other weights than those they were trained beside.

    To be called before the weights are loaded, which need not fit the adapters' model at all.

    Args:
        checkpoint: That the run goes on from.
        base: What its adapters stand beside; None where the whole model is trained.

    Raises:
        UsageError: The weights are others, or one has adapters and the other has none.
    """
    saved = _read_common(checkpoint).get("base")
    if (saved is None) != (base is None):
        was, wanted = ("the model", "adapters") if saved is None else ("adapters", "the model")
        raise UsageError(
            f"{checkpoint}: the run trained {was}, and the present configuration trains "
            f"{wanted}; undo the overrides of peft.*, or start a new run"
        )
    if saved is not None and base is not None:
        base.refuse_another(saved, checkpoint)


def counters_of(checkpoint: Path) -> TrainState:
    """Return how far a run had come at a checkpoint."""
    counters = TrainState()
    counters.load_state_dict(_counters(_read_common(checkpoint)))
    return counters


def load_model_weights(chunks: list[Any], checkpoint: Path, ranks: Ranks) -> None:
    """Take a model's weights from a checkpoint of a run or of weights alone.

    Args:
        chunks: This rank's model chunks, not in DDP.
        checkpoint: The checkpoint's folder.
        ranks: The process groups.

    Raises:
        UsageError: The checkpoint does not fit the model, or holds adapters alone.
    """
    if "base" in _read_common(checkpoint):
        raise UsageError(
            f"{checkpoint}: holds adapters and not the model that they stand beside; make one of "
            f"both first: bridge merge {checkpoint} --output DIR"
        )
    metadata = {"singleton_local_shards": False, "dp_cp_group": ranks.own_groups.dp_cp}
    names = [_chunk_name(index, len(chunks)) for index in range(len(chunks))]
    wanted = {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, chunks, strict=True)
    }
    for entries in wanted.values():
        _keep_extra_states(entries, checkpoint)
    state = _load(checkpoint, wanted)
    with restricted_loading(checkpoint, _extra_states(state)):
        for name, chunk in zip(names, chunks, strict=True):
            chunk.load_state_dict(state[name])


def load_adapters(chunks: list[Any], checkpoint: Path, base: Base | None, ranks: Ranks) -> str:
    """Take the state of adapters from a checkpoint of a run; return where their base was then.

    Args:
        chunks: This rank's model chunks with adapters attached, not in DDP.
        checkpoint: The checkpoint's folder.
        base: The weights that they stand beside; None where those do not matter.
        ranks: The process groups.

    Raises:
        UsageError: The checkpoint does not fit, or belongs to another base.
    """
    saved = _read_common(checkpoint).get("base")
    if saved is None:
        raise UsageError(f"{checkpoint}: holds a whole model and no adapters")
    if base is not None:
        base.refuse_another(saved, checkpoint)
    metadata = {"singleton_local_shards": True, "dp_cp_group": ranks.own_groups.dp_cp}
    names = [_chunk_name(index, len(chunks)) for index in range(len(chunks))]
    state = _load(
        checkpoint,
        {
            name: only_trained(chunk.sharded_state_dict(metadata=metadata))
            for name, chunk in zip(names, chunks, strict=True)
        },
    )
    with restricted_loading(checkpoint, _extra_states(state)):
        for name, chunk in zip(names, chunks, strict=True):
            load_trained(chunk, state.get(name, {}))
    return str(saved["place"])


def save_model_weights(
    chunks: list[Any], checkpoint: Path, config: ConfigContainer, ranks: Ranks
) -> None:
    """Write a checkpoint that has the model's weights and nothing else, for runs to start from.

    Args:
        chunks: This rank's model chunks, not in DDP.
        checkpoint: An empty folder.
        config: Saved beside the weights.
        ranks: The process groups.
    """
    content = {"singleton_local_shards": False}
    metadata = {**content, "dp_cp_group": ranks.own_groups.dp_cp}
    state = {
        "format_version": FORMAT_VERSION,
        **{
            _chunk_name(index, len(chunks)): chunk.sharded_state_dict(metadata=metadata)
            for index, chunk in enumerate(chunks)
        },
    }
    save_sharded(state, checkpoint, content, ranks.control_group)
    if is_logging_rank():
        write_config(checkpoint / "config.yaml", config)
        write_manifest(checkpoint)


def _chunk_name(index: int, chunks: int) -> str:
    return "model" if chunks == 1 else f"model{index}"


def _read_common(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors."""
    from megatron.core import dist_checkpointing

    with reading(checkpoint, "it is no checkpoint of a run, or it is damaged"):
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint))
    # Weights alone have no such file, and of checkpoints of an older form all is in the other.
    path = checkpoint / _RUN_STATE
    if path.exists():
        common |= _read_run_state(path)
    if _format_version(common) > FORMAT_VERSION:
        raise UsageError(
            f"{checkpoint}: has format version {_format_version(common)}, and this version of "
            f"bridge reads versions up to {FORMAT_VERSION}; install the one that saved it"
        )
    if "format_version" in common:
        refuse_missing_manifest(checkpoint)
    return common


def _format_version(common: Mapping[str, Any]) -> int:
    return int(common.get("format_version", 1))


def _read_run_state(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged, take "
            "another checkpoint"
        ) from error


def _counters(common: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: _counter(value) for name, value in common["train_state"].items()}


def _counter(value: Any) -> torch.Tensor:
    """Return a counter of `TrainState` in the form in which it is loaded."""
    dtype = torch.float64 if isinstance(value, float) else torch.int64
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)


def _load(checkpoint: Path, wanted: dict[str, Any]) -> Any:
    from megatron.core import dist_checkpointing

    with reading(checkpoint, "it does not fit the model that is configured, or it is damaged"):
        return dist_checkpointing.load(wanted, str(checkpoint))


@contextlib.contextmanager
def reading(checkpoint: Path, meaning: str) -> Iterator[None]:
    """Read a checkpoint that may come from anybody; hold back torch's own warnings.

    Args:
        checkpoint: The checkpoint's folder.
        meaning: What it means if reading fails.

    Raises:
        UsageError: In place of what megatron-core and torch raise; or the checkpoint holds what is
            not to be unpickled.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings(), restricted_loading(checkpoint):
            # What torch has against the way in which megatron-core calls it.
            for message in _WARNINGS_OF_READING:
                warnings.filterwarnings("ignore", message)
            yield
    except json.JSONDecodeError as error:
        # The one such file that megatron-core reads.
        raise UsageError(
            f"{checkpoint / 'metadata.json'}: is no JSON ({error}); the file is damaged, take "
            "another checkpoint"
        ) from error
    except (CheckpointingException, CheckpointException, KeyError, OSError) as error:
        raise UsageError(
            f"{checkpoint}: {meaning} ({_first_reason(error)}); compare "
            f"{checkpoint / 'config.yaml'} with `bridge show`"
        ) from error


def _first_reason(error: BaseException) -> str:
    """Return one line: torch's own error holds the tracebacks of all ranks."""
    from torch.distributed.checkpoint import CheckpointException

    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {error}"


def _extra_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what modules unpickle themselves, in the states of all chunks."""
    return {
        name: value
        for chunk in state.values()
        if isinstance(chunk, Mapping)
        for name, value in chunk.items()
        if str(name).endswith("_extra_state")
    }


def _keep_extra_states(wanted: dict[str, Any], checkpoint: Path) -> None:
    """Let Transformer Engine's modules keep their extra states where the checkpoint has none.

    The local layers have no such states, and without FP8 there is nothing in them.
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    with reading(checkpoint, "it is no checkpoint, or it is damaged"):
        saved = {entry.key for entry in load_sharded_metadata(str(checkpoint)).values()}
    for name, entry in wanted.items():
        is_extra = isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state")
        if is_extra and entry.key not in saved:
            wanted[name] = LocalNonpersistentObject(entry.data)


def _rng_key() -> str:
    return f"rng_{rank()}"


def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
