"""Tokenizers: those of megatron-core by name, and one for plain bytes."""

import contextlib
import importlib.util
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from bridge.gpt.data.cache import file_state
from bridge.training.config import TokenizerConfig
from bridge.training.file_kinds import head_of, is_text, kind_of
from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.tokenizers import MegatronTokenizer

logger = logging.getLogger(__name__)

BYTE_VALUES = 256
END_OF_DOCUMENT = 256
"""The only token of the byte tokenizer that is not a byte."""

# Our name: (megatron-core's name, the module that it needs).
_LIBRARIES = {
    "huggingface": ("huggingface", "transformers"),
    "sentencepiece": ("sentencepiece", "sentencepiece"),
    "tiktoken": ("tiktoken", "tiktoken"),
}
# megatron-core's own defaults for tiktoken files.
_TIKTOKEN_SPECIAL_TOKENS = 1000
_TIKTOKEN_LARGEST_VOCABULARY = 2**17


class Tokenizer(Protocol):
    """The methods of megatron-core's tokenizers that datasets and sampling use."""

    def tokenize(self, text: str) -> list[int]:
        """Turn text into token ids."""
        ...

    def detokenize(self, ids: list[int]) -> str:
        """Turn token ids into text."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    @property
    def eod(self) -> int:
        """Id of the token that ends a document."""
        ...


class ByteTokenizer:
    """One token a byte, and one for the end of a document.

    megatron-core's byte-level tokenizer ends documents with byte 0, pads with byte 1 and strips
    white space when it decodes. This one reserves no byte and decodes to what it encoded.
    """

    def tokenize(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of the text."""
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Iterable[int]) -> str:
        """Decode UTF-8; ends of documents are skipped, stray bytes become U+FFFD."""
        known = bytes(index for index in map(int, ids) if 0 <= index < BYTE_VALUES)
        return known.decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        """257: every byte and the end of a document."""
        return BYTE_VALUES + 1

    @property
    def eod(self) -> int:
        """Id of the end of a document."""
        return END_OF_DOCUMENT

    @property
    def pad(self) -> int:
        """-1: no token is padding (megatron-core masks the loss wherever a label is this id)."""
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """The tokenizer's part in the names of megatron-core's cached indices."""
        # The former path of this class: with another name, all cached indices would be rebuilt.
        return OrderedDict({"class": "bridge.gpt.data.tokenizers.ByteTokenizer"})


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer that the configuration names, from local files only.

    Raises:
        UsageError: A library or a file is missing, or the tokenizer cannot mark the end of a
            document.
    """
    if config.type == "bytes":
        return ByteTokenizer()
    if config.type == "null":
        return _from_megatron("null-text", vocab_size=_given_vocab_size(config))
    library, module = _LIBRARIES[config.type]
    model = _existing_model(config)
    if importlib.util.find_spec(module) is None:
        raise UsageError(
            f"tokenizer.type={config.type} needs the package {module}, which is not installed; "
            f"install it with: pip install {module} (with uv: uv run --with {module} bridge ...)"
        )
    options: dict[str, Any] = {}
    try:
        if config.type == "tiktoken":
            options["vocab_size"] = config.vocab_size or _tiktoken_vocab_size(model)
        tokenizer = _from_megatron(library, tokenizer_path=model, **options)
    except Exception as error:
        # Each library has errors of its own for a file that it cannot load.
        raise UsageError(_cannot_be_loaded(config, Path(model), error)) from error
    if _end_of_document(tokenizer) is None:
        raise UsageError(
            f"tokenizer.model={config.model!r} has no end-of-sequence token, which marks the end "
            "of a document; use a tokenizer that has one"
        )
    return tokenizer


def tokenizer_vocab_size(config: TokenizerConfig) -> int:
    """Return the number of tokens; cheap for bytes and null, else the tokenizer is loaded.

    Raises:
        UsageError: As in `build_tokenizer`.
    """
    if config.type == "bytes":
        return BYTE_VALUES + 1
    if config.type == "null":
        return _given_vocab_size(config)
    return int(build_tokenizer(config).vocab_size)


def tokenizer_identity(config: TokenizerConfig) -> dict[str, Any]:
    """Return a description that no other tokenizer has, for the key of cached tokens."""
    described: dict[str, Any] = {"type": config.type, "vocab_size": config.vocab_size}
    if config.type in _LIBRARIES:
        model = Path(_existing_model(config))
        files = sorted(model.iterdir()) if model.is_dir() else [model]
        described["files"] = [file_state(file) for file in files if file.is_file()]
    return described


def _from_megatron(library: str, **options: Any) -> Tokenizer:
    tokenizer: Any = MegatronTokenizer.from_pretrained(
        metadata_path={"library": library}, **options
    )
    found: Tokenizer = tokenizer
    return found


def _cannot_be_loaded(config: TokenizerConfig, model: Path, error: Exception) -> str:
    """Return the message for a tokenizer that did not load, with a remedy that has a setting."""
    named = f"tokenizer.model={config.model!r}"
    if config.type != "huggingface":
        reason = next(iter(str(error).splitlines()), "no reason is given")
        return (
            f"{named}: {config.type} cannot load it ({type(error).__name__}: {reason}); give a "
            f"tokenizer file of {config.type}"
        )
    for file in (model / "tokenizer_config.json", model / "config.json"):
        with contextlib.suppress(OSError, ValueError):
            if "auto_map" in json.loads(file.read_text()):
                return (
                    f"{named}: its tokenizer is Python code of the folder (auto_map in {file}), "
                    "which is not run; give a tokenizer that transformers knows, such as a "
                    "tokenizer.json of its own in a folder without that code"
                )
    # megatron-core raises its error while it handles that of transformers.
    cause = error.__context__ or error
    reason = next(iter(str(cause).splitlines()), "")
    return (
        f"{named}: transformers cannot load it ({type(cause).__name__}: {reason}); give a folder "
        "with tokenizer.json and tokenizer_config.json"
    )


def _end_of_document(tokenizer: Tokenizer) -> int | None:
    try:
        end = tokenizer.eod
    except (AttributeError, TypeError, IndexError):
        # transformers' tokenizers fail in several ways if there is no such token.
        return None
    return end if isinstance(end, int) and end >= 0 else None


def _given_vocab_size(config: TokenizerConfig) -> int:
    if config.vocab_size is None or config.vocab_size < 1:
        raise UsageError(
            f"tokenizer.vocab_size={config.vocab_size}: the null tokenizer has no files to take "
            "it from; give the number of tokens, such as tokenizer.vocab_size=32000"
        )
    return config.vocab_size


def _existing_model(config: TokenizerConfig) -> str:
    what = "directory" if config.type == "huggingface" else "file"
    if not config.model:
        raise UsageError(
            f"tokenizer.model: tokenizer.type={config.type} needs the {what} of the tokenizer; "
            "give tokenizer.model=PATH"
        )
    path = os.path.abspath(os.path.expanduser(config.model))
    if os.path.isfile(path):
        _reject_other_files(config, Path(path))
    elif config.type != "huggingface" or not os.path.isdir(path):
        raise UsageError(
            f"tokenizer.model={config.model!r}: there is no such {what} ({path}); it is not "
            "downloaded for you, fetch it first"
        )
    return path


def _reject_other_files(config: TokenizerConfig, path: Path) -> None:
    """Reject a file whose first bytes are not those of a tokenizer of the type."""
    head = head_of(path)
    kind = kind_of(head)
    wanted = {
        "huggingface": "the folder that its files are in",
        "sentencepiece": "a sentencepiece model",
        "tiktoken": "JSON",
    }[config.type]
    text_is_right = {"sentencepiece": False, "tiktoken": True}.get(config.type)
    if kind is None and is_text(head) is text_is_right:
        return
    what = kind or ("text" if is_text(head) else "binary data")
    raise UsageError(
        f"tokenizer.model={config.model!r}: is {what}, and tokenizer.type={config.type} reads "
        f"{wanted}; set the type that goes with the file, or give another"
    )


def _tiktoken_vocab_size(model: str) -> int:
    with open(model, "rb") as stream:
        entries = len(json.load(stream))
    return min(_TIKTOKEN_LARGEST_VOCABULARY, entries + _TIKTOKEN_SPECIAL_TOKENS)
