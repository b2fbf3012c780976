"""The command `bridge show-batch`: prints the tokens, labels and loss mask of a microbatch."""

import argparse
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    import torch

    from bridge.gpt.data.tokenization.tokenizers import Tokenizer
    from bridge.training.config import ConfigContainer

    Batch = Mapping[str, torch.Tensor]

_HEADER = ("position", "id", "token", "label", "predicts", "mask")
_NEEDED = ("tokens", "labels", "loss_mask", "position_ids")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; an entry point of the group ``bridge.commands``."""
    from bridge.training.recipe_lookup import add_configuration_arguments

    parser = commands.add_parser(
        "show-batch",
        help="print a microbatch: tokens, labels, loss mask",
        description="Print the first samples that a GPT recipe trains on: each token with its "
        "label and whether that counts in the loss.",
    )
    add_configuration_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="as a run of N ranks")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="how many (default: one microbatch)"
    )
    parser.set_defaults(run=run_show_batch)


def run_show_batch(options: argparse.Namespace) -> int:
    """Run ``bridge show-batch`` and return the exit code.

    Raises:
        UsageError: The configuration has problems, or the recipe's samples are not those of a GPT.
    """
    from bridge.gpt.data.tokenization.tokenizers import build_tokenizer
    from bridge.training.megatron_import import expected_messages_held_back
    from bridge.training.recipe_lookup import checked_ranks, configure, find_recipe, read_documents

    if options.samples is not None and options.samples < 1:
        raise UsageError(f"--samples: {options.samples} samples show nothing; give 1 or more")
    config = configure(
        find_recipe(options.recipe),
        read_documents(options.config),
        options.overrides,
        world_size=checked_ranks(options.nproc),
    )
    tokenizer = None
    if config.tokenizer is not None and config.tokenizer.type != "null":
        tokenizer = build_tokenizer(config.tokenizer)
    wanted = options.samples or config.train.micro_batch_size
    with expected_messages_held_back(), warnings.catch_warnings():
        # megatron-core's log warns that there are no ranks.
        warnings.filterwarnings("ignore", "Could not determine rank")
        samples = itertools.chain.from_iterable(map(_samples_of, microbatches(config)))
        shown = list(itertools.islice(samples, wanted))
    for number, sample in enumerate(shown, start=1):
        print("\n".join(describe_sample(sample, number, tokenizer)), end="\n\n")
    return 0


def microbatches(config: "ConfigContainer") -> Iterator["Batch"]:
    """Yield the microbatches of a run of one data-parallel rank, from the first step on.

    Raises:
        UsageError: They lack a tensor that `bridge.training.gpt_step` needs.
    """
    from torch.utils.data import default_collate

    from bridge.training.contracts import DataShard
    from bridge.training.data.run_data import data_request
    from bridge.training.data.sample_order import MicrobatchSampler, SampleOrder
    from bridge.training.data.splits import as_splits

    splits = as_splits(config.dataset.build(data_request(config)))
    train: Any = splits.train
    sampler = MicrobatchSampler(
        SampleOrder(len(train), shuffle=splits.shuffle, seed=config.rng.seed),
        DataShard(rank=0, size=1, samples=config.train.micro_batch_size),
        start=0,
    )
    for indices in sampler:
        batch = (splits.collate or default_collate)([train[index] for index in indices])
        names = batch if isinstance(batch, Mapping) else {}
        if missing := [name for name in _NEEDED if name not in names]:
            raise UsageError(
                f"show-batch: the recipe's samples have no {' and no '.join(missing)}; it shows "
                "those of GPT recipes"
            )
        yield batch


def describe_sample(sample: "Batch", number: int, tokenizer: "Tokenizer | None") -> Iterator[str]:
    """Yield the lines that show a sample.

    Args:
        sample: Tensors of shape [sequence]; ``padding_mask`` and ``cu_seqlens`` may be there.
        number: The number of the sample, for its heading.
        tokenizer: For the text of each token; None shows ids alone.
    """
    mask = sample["loss_mask"]
    padding = sample["padding_mask"].tolist() if "padding_mask" in sample else [False] * len(mask)
    real, counted = padding.count(False), int((mask != 0).sum())
    starts = set(sample["cu_seqlens"].tolist()[:-1]) if "cu_seqlens" in sample else {0}
    starts = {start for start in starts if start < len(padding) and not padding[start]}
    yield (
        f"sample {number}: {real} positions"
        + (f" in {len(starts)} packed documents" if "cu_seqlens" in sample else "")
        + (f" and {len(padding) - real} of padding" if real < len(padding) else "")
        + f"; {counted} count in the loss ({100 * counted / max(real, 1):.1f} %)"
    )
    rows: list[tuple[str, ...]] = [_HEADER]
    for index, is_padding in enumerate(padding):
        if is_padding:
            continue
        if index in starts and index:
            rows.append(("",) * len(_HEADER))
        token, label = int(sample["tokens"][index]), int(sample["labels"][index])
        rows.append(
            (
                str(int(sample["position_ids"][index])),
                str(token),
                _token_text(token, tokenizer),
                str(label),
                _token_text(label, tokenizer),
                f"{float(mask[index]):g}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        cells = (
            cell.ljust(width) if name in ("token", "predicts") else cell.rjust(width)
            for name, cell, width in zip(_HEADER, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _samples_of(batch: "Batch") -> Iterator["Batch"]:
    """Yield the samples of a microbatch: of each tensor [batch, ...] its [...]."""
    for row in range(len(batch["tokens"])):
        yield {name: values[row] for name, values in batch.items()}


def _token_text(token: int, tokenizer: "Tokenizer | None") -> str:
    """Return the text of a token in quotes, or its name if it has no text."""
    if tokenizer is None:
        return ""
    text = tokenizer.detokenize([token])
    if token == tokenizer.eod:
        return "end"
    return f"<0x{token:02X}>" if text in ("", "\N{REPLACEMENT CHARACTER}") else repr(text)
