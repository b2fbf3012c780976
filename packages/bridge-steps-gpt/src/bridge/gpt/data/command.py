"""The command `bridge data build`: makes token files from text, for many runs to use."""

import argparse
import sys
import time

from bridge.training.local_paths import PathOption
from bridge.training.usage_error import UsageError


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``data`` to the `bridge` command; an entry point of the group ``bridge.commands``."""
    data = commands.add_parser("data", help="make training data")
    actions = data.add_subparsers(dest="data_command", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="tokenize text into PREFIX.bin and PREFIX.idx",
        description="Tokenize text into PREFIX.bin and PREFIX.idx, for dataset.path=PREFIX.",
    )
    build.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        action=PathOption,
        help="a text file, a directory, a glob in quotes, or JSON Lines (.jsonl, --json-key); "
        "also compressed (.gz, .bz2, .xz)",
    )
    build.add_argument(
        "--output", required=True, metavar="PREFIX", action=PathOption, help="never overwritten"
    )
    build.add_argument(
        "--tokenizer",
        default="bytes",
        choices=["bytes", "huggingface", "sentencepiece", "tiktoken"],
        help="kind of tokenizer (default: bytes)",
    )
    build.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        action=PathOption,
        help="the tokenizer's directory or file",
    )
    build.add_argument(
        "--json-key", default="text", metavar="KEY", help="where JSON Lines hold the text"
    )
    build.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token (default: yes)",
    )
    build.set_defaults(run=run_build)


def run_build(options: argparse.Namespace) -> int:
    """Run ``bridge data build`` and return the exit code.

    Raises:
        UsageError: Input is missing or empty, or the output exists.
    """
    # These import torch and megatron-core, which other commands should not wait for.
    from bridge.gpt.data.text.sources import find_source
    from bridge.gpt.data.token_files import build_token_files
    from bridge.gpt.data.tokenization.tokenizers import build_tokenizer
    from bridge.training.config import TokenizerConfig

    start = time.monotonic()
    sources = [find_source(entry, field="INPUT") for entry in options.inputs]
    for source in sources:
        if source.prefixes:
            raise UsageError(
                f"INPUT={source.entry!r} holds token files ({source.prefixes[0]}), not text; "
                "give them to training as they are: dataset.path=PREFIX"
            )
    files = [file for source in sources for file in source.files]
    tokenizer = build_tokenizer(
        TokenizerConfig(type=options.tokenizer, model=options.tokenizer_model)
    )
    counts = build_token_files(
        files,
        tokenizer,
        options.output,
        json_key=options.json_key,
        append_eod=options.append_eod,
    )
    sys.stdout.write(
        f"{counts.documents} documents, {counts.tokens} tokens of {len(files)} files "
        f"in {time.monotonic() - start:.1f} s\n"
        f"wrote {options.output}.bin and {options.output}.idx\n"
    )
    not_read = [line for source in sources for line in source.not_read]
    sys.stdout.writelines(f"warning: {line}\n" for line in [*not_read, *counts.warnings()])
    return 0
