"""config.yaml of a run and of its checkpoints: written atomically, read with its name in errors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.training.durable_files import replace_durably
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer

# YAML's mark of a document's end: a file that lacks it was cut off.
_END = "...\n"


def write_config(path: Path, config: "ConfigContainer") -> None:
    """Write a resolved configuration with a mark at its end, by which a cut file is recognized."""
    replace_durably(path, config.to_yaml() + _END)


def has_end(path: Path) -> bool:
    """Whether a config.yaml that can be read ends as `write_config` ends it."""
    try:
        return path.read_text(encoding="utf-8").endswith(f"\n{_END}")
    except (OSError, UnicodeDecodeError):
        return False


def read_config_text(path: Path, remedy: str, *, may_lack_end: bool = False) -> str:
    """Return the text of a config.yaml that `write_config` has written.

    Args:
        path: The file.
        remedy: The user's remedy where it is damaged, for the message.
        may_lack_end: Accept a file without a mark at its end, as older versions wrote it.

    Raises:
        UsageError: It cannot be read, is no YAML of sections, or was cut off.
    """
    from bridge.training.config.schema.errors import ConversionError
    from bridge.training.config.schema.yaml12 import load_yaml

    try:
        text = path.read_text(encoding="utf-8")
        sections = load_yaml(text)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: is missing; {remedy}") from error
    except (OSError, UnicodeDecodeError, ConversionError) as error:
        raise UsageError(f"{path}: {cause_of(error)}; {remedy}") from error
    if not text.strip():
        raise UsageError(f"{path}: is empty; {remedy}")
    if not isinstance(sections, dict):
        raise UsageError(f"{path}: holds no sections; {remedy}")
    if not may_lack_end and not text.endswith(f"\n{_END}"):
        raise UsageError(
            f"{path}: is cut off (a whole one ends with a line '...', which files of older "
            f"versions lack: add it if nothing is missing); {remedy}"
        )
    return text


def read_config(path: Path, remedy: str, *, may_lack_end: bool = False) -> dict[str, Any]:
    """Return the sections of a config.yaml, as `read_config_text` reads it."""
    from bridge.training.config.schema.yaml12 import load_yaml

    sections: dict[str, Any] = load_yaml(read_config_text(path, remedy, may_lack_end=may_lack_end))
    return sections


def cause_of(error: Exception) -> str:
    """Return the reason why a file could not be read, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return "is no text"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return str(error)
