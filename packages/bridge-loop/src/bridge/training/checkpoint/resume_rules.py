"""The rules of a resume: the settings that it may change, and those of a start from other weights.

A run that is resumed keeps its model, its adapters and their base, its data, its seed and the kind
of its optimizer. A run that starts from the weights of another keeps the model. Settings of a
model's execution may differ in both (`bridge.training.config.model_identity` has the kind of each
field).
"""

from collections.abc import Iterator, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from bridge.training.checkpoint.base import Base
from bridge.training.checkpoint.run_state import read_common
from bridge.training.config import ConfigContainer, ConfigError, Problem
from bridge.training.config.model_identity import FieldKind, field_kinds, kind_at
from bridge.training.config.provenance import DERIVED
from bridge.training.config.schema.fields import (
    TARGET,
    fields_of,
    is_dataclass_instance,
    is_default,
    value_at,
)
from bridge.training.config.schema.to_plain import to_plain
from bridge.training.run_files.configuration import read_config
from bridge.training.run_files.directory import RunDirectory
from bridge.training.usage_error import UsageError

_FIXED_SECTIONS = ("peft", "dataset", "tokenizer")
_FIXED_FIELDS = ("rng.seed", "rng.layout_invariant_init")


def reject_another_run(directory: RunDirectory, config: ConfigContainer) -> None:
    """Reject a start that would continue a run as another one; do nothing for a new run.

    Args:
        directory: The run's files.
        config: The resolved configuration of this start; its `command` is the entry point.

    Raises:
        UsageError: Another entry point made the run, or its configuration cannot be read.
        ConfigError: With every value that differs and must not.
    """
    if not config.checkpoint.resume or not directory.config.exists():
        return
    saved = read_config(directory.config, directory.remedy_of_config())
    _reject_another_command(saved.get("command"), directory, config)
    problems = [
        Problem(
            (path,),
            f"{path}={new!r}: the run was started with {old!r}, and another value changes "
            f"{_what_changes(path)}; leave it, or start a new run "
            "(checkpoint.pretrained_checkpoint takes the weights along)",
        )
        for path, old, new in _changed_values(saved, config)
    ]
    if problems:
        raise ConfigError(problems)


def reject_another_model(checkpoint: Path, config: ConfigContainer) -> None:
    """Reject a configuration whose model is another than that of the weights it starts from.

    Args:
        checkpoint: Its folder. One without a configuration is not compared.
        config: The resolved configuration.

    Raises:
        UsageError: The checkpoint's configuration cannot be read.
        ConfigError: With every field that differs.
    """
    file = checkpoint / "config.yaml"
    if not file.exists():
        return
    saved = read_config(file, "give another checkpoint", may_lack_end=True).get("model")
    if not saved:
        return
    wanted = _plain_values(config, "model")
    kinds = field_kinds(type(config.model))
    problems = [
        Problem(
            (path,),
            f"{path}: the checkpoint {checkpoint} is of a model with {value!r}, and "
            f"{wanted.get(path)!r} would be another; leave it out",
        )
        for path, value in flatten({"model": saved}).items()
        if kind_at(path.partition(".")[2], kinds) == "identity"
        and not path.endswith(TARGET)
        and wanted.get(path) != value
        and not _lacks_field(config, path)
    ]
    if problems:
        raise ConfigError(problems)


def reject_another_base(checkpoint: Path, base: Base | None) -> None:
    """Reject adapters on top of other weights than those they were trained on.

    It is called before the weights are loaded, which need not fit the adapters' model at all.

    Args:
        checkpoint: The one that the run continues from.
        base: The base of its adapters; None where the model itself is trained.

    Raises:
        UsageError: The weights are others, or one has adapters and the other has none.
    """
    saved = read_common(checkpoint).get("base")
    if (saved is None) != (base is None):
        was, wanted = ("the model", "adapters") if saved is None else ("adapters", "the model")
        raise UsageError(
            f"{checkpoint}: the run trained {was}, and the present configuration trains "
            f"{wanted}; undo the overrides of peft.*, or start a new run"
        )
    if saved is not None and base is not None:
        base.reject_other_weights(saved, checkpoint)


def reject_other_data(checkpoint: Path, common: Mapping[str, Any], fingerprint: str) -> None:
    """Reject data whose samples come in another order than those that the run was trained on.

    Args:
        checkpoint: The one that the run continues from.
        common: Its content from `read_common`.
        fingerprint: The name of the present order (`RunData.fingerprint`).

    Raises:
        UsageError: The order is another.
    """
    saved = common["data_fingerprint"]
    if saved != fingerprint:
        raise UsageError(
            f"{checkpoint}: the run was trained on data in the order {saved!r}; the present "
            f"configuration draws {fingerprint!r}; undo the overrides of dataset.*, rng.seed or "
            "train.train_iters, or start a new run with checkpoint.pretrained_checkpoint"
        )


def reject_another_optimizer(
    checkpoint: Path, common: Mapping[str, Any], config: ConfigContainer
) -> None:
    """Reject an optimizer that cannot take the saved state.

    Args:
        checkpoint: The one that the run continues from.
        common: Its content from `read_common`.
        config: The resolved configuration.

    Raises:
        UsageError: The optimizer is of another kind.
    """
    # Checkpoints of an older form lack it.
    saved = common.get("optimizer", {})
    for field, value in optimizer_kind(config).items():
        if saved.get(field, value) != value:
            raise UsageError(
                f"{field}={_shown(value)}: {checkpoint} has the optimizer state of "
                f"{field}={_shown(saved[field])}; leave it so, or start a new run from its "
                f"weights with checkpoint.pretrained_checkpoint={checkpoint}"
            )


def optimizer_kind(config: ConfigContainer) -> dict[str, Any]:
    """Return the settings that decide the content of an optimizer's state."""
    return {
        "optimizer.optimizer": config.optimizer.optimizer,
        "ddp.use_distributed_optimizer": config.ddp.use_distributed_optimizer,
    }


def decided_by_checkpoint(
    section: Mapping[str, Any], kinds: Mapping[str, FieldKind], place: str = ""
) -> dict[str, Any]:
    """Return the fields of a saved model section that make up the model's identity.

    Args:
        section: The section, or one of a module within it.
        kinds: Of the fields (`field_kinds`).
        place: Where the section is within the model's, with a dot behind it.
    """
    kept: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            decided = decided_by_checkpoint(value, kinds, f"{place}{name}.")
            # A section without such fields is not to be compared as an empty one.
            kept |= {name: decided} if decided or not value else {}
        elif kind_at(f"{place}{name}", kinds) in ("identity", "extensible"):
            kept[name] = value
    return kept


def flatten(fields: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Return the values by their paths: a model of several modules has sections inside."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inner = flatten(value, f"{place}{name}.") if isinstance(value, Mapping) else {}
        found |= inner or {f"{place}{name}": value}
    return found


def _reject_another_command(
    made_by: str | None, directory: RunDirectory, config: ConfigContainer
) -> None:
    # Older runs did not record it.
    if None not in (made_by, config.command) and made_by != config.command:
        raise UsageError(
            f"checkpoint.run_dir={str(directory.path)!r}: it holds a run of {made_by}, and "
            f"{config.command} would continue it as another; use `bridge {made_by}`, or start a "
            "new run"
        )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _what_changes(path: str) -> str:
    of_the_model = path.partition(".")[0] in ("model", "peft")
    return "the model (or the state of its optimizer)" if of_the_model else "the order of its data"


def _changed_values(
    saved: Mapping[str, Any], config: ConfigContainer
) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, saved value and present value of each field that differs and must not."""
    kinds = field_kinds(type(config.model))
    listed = saved.get(DERIVED) or []
    for section in ("model", *_FIXED_SECTIONS, "rng"):
        # A run without adapters or a tokenizer is recognized by its checkpoint.
        if not isinstance(saved.get(section), Mapping) or getattr(config, section) is None:
            continue
        old, new = flatten({section: saved[section]}), _plain_values(config, section)
        for path in sorted(old.keys() | new.keys()):
            if (
                old.get(path) != new.get(path)
                and _is_fixed(path, kinds)
                # A value that is derived, and was, follows from values that are compared.
                and not (path in listed and config.provenance.is_derived(path))
                and not (path not in old and _is_unset(config, path))
                and not (path not in new and _lacks_field(config, path))
            ):
                yield path, old.get(path), new.get(path)


def _plain_values(config: ConfigContainer, section: str) -> dict[str, Any]:
    return flatten({section: to_plain(getattr(config, section), Any, section)})


def _is_fixed(path: str, kinds: Mapping[str, FieldKind]) -> bool:
    section, _, name = path.partition(".")
    if name.endswith(TARGET):
        return False  # A class may be moved to another module.
    if section == "model":
        return kind_at(name, kinds) != "execution"
    return section in _FIXED_SECTIONS or path in _FIXED_FIELDS


def _is_unset(config: ConfigContainer, path: str) -> bool:
    """Whether a field, which older versions lack, has the value that it has if nobody sets it."""
    if config.provenance.is_derived(path):
        return True
    field = _fields_next_to(config, path).get(path.rpartition(".")[2])
    return field is not None and is_default(value_at(config, path), field)


def _lacks_field(config: ConfigContainer, path: str) -> bool:
    """Whether a field of older versions does not exist any more."""
    fields = _fields_next_to(config, path)
    return bool(fields) and path.rpartition(".")[2] not in fields


def _fields_next_to(config: ConfigContainer, path: str) -> Mapping[str, Field[Any]]:
    """Return the fields of the dataclass that `path` leads into; none where it is a mapping."""
    try:
        holder = value_at(config, path.rpartition(".")[0])
    except KeyError:
        return {}
    return fields_of(holder) if is_dataclass_instance(holder) else {}
