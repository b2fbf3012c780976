"""Rotary embeddings in config.json, of older and of newer files."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.gpt.model_config import GPTModelConfig

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
"""The keys of config.json that describe the rotary embedding."""

# The constants of Llama 3.1's rotary embedding, which megatron-core has in its code.
_LLAMA31_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding that a config.json describes, by the keys of newer files.

    Older files have rope_theta on its own and rope_scaling, whose kind was first called type.
    """
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return {
        "rope_theta": values.get("rope_theta", 10000.0),
        "rope_type": given.get("type", "default"),
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
        **given,
    }


def rope_problems(rope: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each value in the result of `read_rope` that is not supported."""
    kind = rope["rope_type"]
    if kind not in ("default", "llama3"):
        yield f"rope_type: {kind!r}; only 'default' and 'llama3' are"
    if kind == "llama3":
        for name, wanted in _LLAMA31_CONSTANTS.items():
            if rope.get(name) != wanted:
                yield f"{name} of the rope: {rope.get(name)!r}; only Llama 3.1's {wanted} is"
    if rope["rope_theta"] != int(rope["rope_theta"]):
        yield f"rope_theta: {rope['rope_theta']!r}; only whole numbers are"
    if rope["partial_rotary_factor"] not in (None, 1.0):
        yield f"partial_rotary_factor: {rope['partial_rotary_factor']!r}; only 1 is"


def rope_scaling_of(model: "GPTModelConfig") -> dict[str, Any] | None:
    """Return the rope_scaling of a model's config.json."""
    if not model.rope_scaling:
        return None
    return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA31_CONSTANTS}
