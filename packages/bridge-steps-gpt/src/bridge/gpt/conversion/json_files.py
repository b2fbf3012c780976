"""Files of one JSON object, in a model's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.training.usage_error import UsageError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UsageError: There is no such file, or it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a model in Hugging "
            "Face's format"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: is no JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no object but {type(values).__name__}; fetch it again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as a JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
