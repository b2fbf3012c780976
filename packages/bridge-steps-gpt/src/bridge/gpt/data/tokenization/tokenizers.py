"""megatron-core's tokenizers by name, and one for plain bytes."""

import contextlib
import importlib.util
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from bridge.training.config import TokenizerConfig
from bridge.training.file_kinds import head_of, is_text, kind_of
from bridge.training.megatron_import import quiet_import
from bridge.training.megatron_patches import library_tokenizer
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.tokenizers import MegatronTokenizer

logger = logging.getLogger(__name__)

BYTE_VALUES = 256
END_OF_DOCUMENT = 256
"""The one token of the byte tokenizer that is no byte."""

# Name here: (name in megatron-core, module that it needs).
_LIBRARIES = {
    "huggingface": ("huggingface", "transformers"),
    "sentencepiece": ("sentencepiece", "sentencepiece"),
    "tiktoken": ("tiktoken", "tiktoken"),
}
# megatron-core's own defaults for tiktoken files.
_TIKTOKEN_SPECIAL_TOKENS = 1000
_TIKTOKEN_LARGEST_VOCABULARY = 2**17


class Tokenizer(Protocol):
    """What datasets and sampling use of megatron-core's tokenizers."""

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
    white space when it decodes; this one takes no byte for itself and returns what went in.
    """

    def tokenize(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of the text."""
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Iterable[int]) -> str:
        """Decode UTF-8; ends of documents are left out, stray bytes become U+FFFD."""
        known = bytes(index for index in map(int, ids) if 0 <= index < BYTE_VALUES)
        return known.decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        """257: every byte and the end of a document."""
        return BYTE_VALUES + 1

    @property
    def vocab(self) -> dict[str, int]:
        """Token to id; a byte is written as ``<0x41>``."""
        return {name: index for index, name in self.inv_vocab.items()}

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Id to token."""
        names = {value: f"<0x{value:02X}>" for value in range(BYTE_VALUES)}
        return names | {END_OF_DOCUMENT: "<end-of-document>"}

    @property
    def eod(self) -> int:
        """Id of the end of a document."""
        return END_OF_DOCUMENT

    @property
    def eos(self) -> int:
        """The same as `eod`."""
        return END_OF_DOCUMENT

    @property
    def pad(self) -> int:
        """-1: no token is padding (megatron-core masks the loss wherever a label is this id)."""
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """The tokenizer's part in the names of megatron-core's cached indices."""
        # No longer the path of this class: another text would make all cached indices anew.
        return OrderedDict({"class": "bridge.gpt.data.tokenizers.ByteTokenizer"})


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer that the configuration names; reads local files only.

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
        # Whatever the library has against the user's file: each raises errors of its own.
        raise UsageError(_cannot_be_loaded(config, Path(model), error)) from error
    if _end_of_document(tokenizer) is None:
        raise UsageError(
            f"tokenizer.model={config.model!r} has no end-of-sequence token, which marks the end "
            "of a document; use a tokenizer that has one"
        )
    return tokenizer


def vocab_size(config: TokenizerConfig) -> int:
    """Number of tokens; cheap for bytes and null, else the tokenizer is loaded.

    Raises:
        UsageError: As `build_tokenizer`.
    """
    if config.type == "bytes":
        return BYTE_VALUES + 1
    if config.type == "null":
        return _given_vocab_size(config)
    return int(build_tokenizer(config).vocab_size)


def identity(config: TokenizerConfig) -> dict[str, Any]:
    """What tells this tokenizer from others, its files included; the key of cached tokens."""
    described: dict[str, Any] = {"type": config.type, "vocab_size": config.vocab_size}
    if config.type in _LIBRARIES:
        model = Path(_existing_model(config))
        files = sorted(model.iterdir()) if model.is_dir() else [model]
        described["files"] = [
            [str(file), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.is_file()
        ]
    return described


def hugging_face_tokenizer(tokenizer: Tokenizer) -> Any | None:
    """Return the transformers tokenizer within megatron-core's, None if it is of another kind."""
    if getattr(tokenizer, "library", None) != "huggingface":
        return None
    return library_tokenizer(tokenizer)


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer itself puts before a text: a beginning-of-sequence token, say."""
    inner = hugging_face_tokenizer(tokenizer)
    if inner is None:
        return []
    text = "a"
    ids: list[int] = inner(text).input_ids
    return ids[: ids.index(piece_ids(tokenizer, text)[0])]


def piece_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Turn a piece of a longer text into ids, without what would stand at its ends."""
    inner = hugging_face_tokenizer(tokenizer)
    if inner is None:
        return list(tokenizer.tokenize(text))
    ids: list[int] = inner(text, add_special_tokens=False).input_ids
    return ids


def special_token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return how the tokens are written that the tokenizer finds in a text and that are none."""
    inner = hugging_face_tokenizer(tokenizer)
    if inner is not None:
        return [t.content for t in inner.added_tokens_decoder.values() if t.special and t.content]
    tiktoken = _tiktoken(tokenizer)
    return [] if tiktoken is None else sorted(tiktoken.special_tokens_set)


def text_ids(tokenizer: Tokenizer, text: str, *, ends: bool = False) -> list[int]:
    """Turn a text into ids; special tokens that are written in it are text.

    With `ends` the tokenizer's own tokens for the ends of a text stand around it.
    """
    inner = hugging_face_tokenizer(tokenizer)
    tiktoken = _tiktoken(tokenizer)
    if tiktoken is not None:
        return list(tiktoken.encode(text, disallowed_special=()))
    if inner is None:
        return list(tokenizer.tokenize(text))
    ids: list[int] = inner(text, add_special_tokens=ends, split_special_tokens=True).input_ids
    return ids


def _tiktoken(tokenizer: Tokenizer) -> Any | None:
    if getattr(tokenizer, "library", None) != "tiktoken":
        return None
    return library_tokenizer(tokenizer)


def _from_megatron(library: str, **options: Any) -> Tokenizer:
    tokenizer: Any = MegatronTokenizer.from_pretrained(
        metadata_path={"library": library}, **options
    )
    found: Tokenizer = tokenizer
    return found


def _cannot_be_loaded(config: TokenizerConfig, model: Path, error: Exception) -> str:
    """Say why a library did not load a tokenizer; its own words advise what has no setting."""
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
        # Hugging Face's fails in several ways where there is no such token.
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
    """Reject a file that is no tokenizer of the type, as its first bytes tell."""
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
