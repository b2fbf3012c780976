"""Tokenizer files in a folder of Hugging Face's format."""

import shutil
from pathlib import Path

from bridge.training.config import TokenizerConfig

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer can be loaded from a folder."""
    return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def tokenizer_folder(tokenizer: TokenizerConfig | None) -> Path | None:
    """Return the folder of a Hugging Face tokenizer, None for other tokenizers."""
    if tokenizer is None or tokenizer.type != "huggingface" or tokenizer.model is None:
        return None
    path = Path(tokenizer.model)
    return path.parent if path.is_file() else path


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files of a tokenizer and of text generation; return their names."""
    copied = [name for name in _FILES if (source / name).exists()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    return copied
