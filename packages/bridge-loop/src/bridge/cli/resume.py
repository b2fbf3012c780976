"""What may change when a run is continued: not its model, and not the order of its data."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer

_FIXED_SECTIONS = ("peft", "dataset", "tokenizer")
_FIXED_FIELDS = {"rng": ("seed", "layout_invariant_init")}
# Fields of a model that decide how it is computed and spread, not what it is.
FREE_MODEL_FIELDS = (
    "parallel",
    "pipeline",
    "recompute",
    "fusion",
    "overlap",
    "cuda_graph",
    "offload",
    "dtype",
    "layer_spec",
    "transformer_impl",
    "attention_backend",
    "gradient_accumulation_fusion",
    "comm",
    "dispatcher",
    "variable_seq_lengths",
    "bf16",
    "fp16",
    "fp8",
    "calculate_per_token_loss",
)


def refuse_another_run(saved: "ConfigContainer", wanted: "ConfigContainer") -> None:
    """Refuse overrides that would make another run of it.

    Args:
        saved: The configuration that the run was started with.
        wanted: The same with this start's overrides.

    Raises:
        ConfigError: With every such override.
    """
    from bridge.training.config import ConfigError

    problems = [
        f"{path}: the run was started with {old!r}, and {new!r} would make "
        f"{_what_it_would_be(path)} of it; "
        "leave it, or start a new run (checkpoint.pretrained_checkpoint takes the weights along)"
        for path, old, new in _differences(saved, wanted)
    ]
    if problems:
        raise ConfigError(problems)


def _what_it_would_be(path: str) -> str:
    of_the_model = path.startswith(("model.", "peft."))
    return "another model (or optimizer state)" if of_the_model else "another order of the data"


def _differences(saved: "ConfigContainer", wanted: "ConfigContainer") -> list[tuple[str, Any, Any]]:
    before, after = saved.to_dict(), wanted.to_dict()
    found = []
    for section in dataclasses.fields(saved):
        old, new = before.get(section.name), after.get(section.name)
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue
        old, new = flat(old), flat(new)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and _is_fixed(section.name, name):
                found.append((f"{section.name}.{name}", old.get(name), new.get(name)))
    return found


def flat(fields: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Return the values within by their paths: a model of several modules has sections inside."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inner = flat(value, f"{place}{name}.") if isinstance(value, dict) else {}
        found |= inner or {f"{place}{name}": value}
    return found


def _is_fixed(section: str, name: str) -> bool:
    if section == "model":
        return not any(part in name for part in FREE_MODEL_FIELDS)
    return section in _FIXED_SECTIONS or name in _FIXED_FIELDS.get(section, ())
