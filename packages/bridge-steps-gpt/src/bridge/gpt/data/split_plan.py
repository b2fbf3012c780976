"""Which documents go to training, validation and test, and how many samples that makes.

It is worked out here, before megatron-core sees the data: on an empty split its count of epochs
never ends, and a sequence longer than the data fails deep inside it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bridge.gpt.data.token_files import Bounds, TokenFiles
from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

WHOLE: Bounds = (0.0, 1.0)
SPLIT_NAMES = ("train", "validation", "test")

_SHARES = (2, 5, 10, 20, 30, 50)


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """One split, ready for megatron-core's builder."""

    prefixes: tuple[str, ...]
    bounds: Bounds
    documents: int
    tokens: int
    samples: int
    """Samples of one pass."""
    weights: tuple[float, ...] | None
    """Shares of the corpora in the blend; None takes each sample once."""
    size: int | None
    """Samples to build; None builds one pass."""
    corpora_digest: str
    """Names the lengths of the documents of all its corpora."""


def parse_split(split: str) -> list[Bounds | None]:
    """Turn ``"99,1,0"`` into the bounds of train, validation and test; None for no share.

    Raises:
        UsageError: It is not one to three numbers, none negative and the first above 0.
    """
    parts = [part.strip() for part in split.split(",")]
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        shares = []
    wrong = not 1 <= len(shares) <= 3 or shares[0] <= 0
    if wrong or any(not 0 <= share < float("inf") for share in shares):
        raise UsageError(
            f"dataset.split={split!r}: give the shares of train, validation and test as up to "
            "three numbers, the first above 0, such as 99,1,0"
        )
    plain = ",".join(f"{share:f}" for share in shares)
    bounds: list[Bounds | None] = convert_split_vector_to_split_matrix(
        parse_and_normalize_split(plain)
    )
    return bounds


def usual_split(corpora: Sequence[TokenFiles], *, seq_length: int, validation_samples: int) -> str:
    """Two percent for validation, or as much of a small corpus as gives so many samples.

    At most half: what is then missing, or wrong, is found when the split is planned.
    """
    share = _sufficient_share(corpora, seq_length, validation_samples) or _SHARES[-1]
    return f"{100 - share},{share},0"


def plan_split(
    name: str,
    corpora: Sequence[TokenFiles],
    *,
    bounds: Bounds,
    seq_length: int,
    split: str,
    weights: Sequence[float] | None = None,
    size: int | None = None,
) -> SplitPlan:
    """Count the documents, tokens and samples of one split.

    A corpus whose share is too small for one sample is left out, unless the user gave it a weight.

    Args:
        name: "train", "validation" or "test"; "validation/NAME" of several.
        corpora: What the split is cut from.
        bounds: First and last document, as fractions of each corpus.
        seq_length: Tokens of a sample; it reads one more, for the last label.
        split: What the user wrote in dataset.split, for the messages.
        weights: Shares of the corpora, as the user gave them.
        size: Samples that will be drawn; None for one pass.

    Raises:
        UsageError: There is not one sample, or not one of a corpus that has a weight.
    """
    shares = [corpus.documents_within(bounds) for corpus in corpora]
    tokens = [int(share.sum(dtype=np.int64)) for share in shares]
    samples = [max(0, count - 1) // seq_length for count in tokens]
    if not any(samples):
        raise UsageError(_too_little(name, corpora, bounds, seq_length, split))
    if weights is not None and not all(samples):
        prefix = corpora[samples.index(0)].prefix
        raise UsageError(
            f"dataset.weights: the {name} split of {prefix} has no sample of "
            f"model.seq_length={seq_length} tokens; leave that path out"
        )
    kept = [index for index, count in enumerate(samples) if count]
    passes = sum(samples)
    if len(kept) == 1:
        # Up to one pass the order does not depend on how much of it is drawn.
        shares_drawn, drawn = None, size if size is not None and size > passes else None
    elif weights is not None:
        shares_drawn, drawn = [weights[index] for index in kept], size or passes
    elif size is not None:
        # Without weights megatron-core would stop after one pass over a blend.
        shares_drawn, drawn = [float(samples[index]) for index in kept], size
    else:
        shares_drawn, drawn = None, None
    return SplitPlan(
        prefixes=tuple(corpora[index].prefix for index in kept),
        bounds=bounds,
        documents=sum(len(share) for share in shares),
        tokens=sum(tokens),
        samples=passes,
        weights=None if shares_drawn is None else tuple(shares_drawn),
        size=drawn,
        corpora_digest=_digest_of_lengths(corpora[index] for index in kept),
    )


def _digest_of_lengths(corpora: Iterable[TokenFiles]) -> str:
    digest = hashlib.sha256()
    for corpus in corpora:
        digest.update(len(corpus.lengths).to_bytes(8, "little"))
        digest.update(corpus.lengths.tobytes())
    return digest.hexdigest()


def _too_little(
    name: str, corpora: Sequence[TokenFiles], bounds: Bounds, seq_length: int, split: str
) -> str:
    every = sum(int(corpus.lengths.sum(dtype=np.int64)) for corpus in corpora)
    if every <= seq_length:
        return (
            f"model.seq_length={seq_length}: the {name} data holds {every} tokens in all and one "
            f"sample needs {seq_length + 1}; give more text or a shorter sequence"
        )
    shares = [corpus.documents_within(bounds) for corpus in corpora]
    documents = sum(len(corpus.lengths) for corpus in corpora)
    message = (
        f"dataset.split={split!r}: the {name} split gets {sum(map(len, shares))} of {documents} "
        f"documents, {sum(int(share.sum(dtype=np.int64)) for share in shares)} tokens, and one "
        f"sample of model.seq_length={seq_length} needs {seq_length + 1}; "
    )
    if name != "validation":
        return message + "give it a larger share, more text or a shorter sequence"
    off = "or turn evaluation off with validation.eval_iters=0"
    share = _sufficient_share(corpora, seq_length)
    if share is None:
        return message + f"give more text or a shorter sequence, {off}"
    return message + f"set dataset.split={100 - share},{share},0 {off}"


def _samples_in(corpora: Sequence[TokenFiles], bounds: Bounds, seq_length: int) -> int:
    counts = [int(corpus.documents_within(bounds).sum(dtype=np.int64)) for corpus in corpora]
    return sum(max(0, count - 1) // seq_length for count in counts)


def _sufficient_share(
    corpora: Sequence[TokenFiles], seq_length: int, samples: int = 1
) -> int | None:
    """Smallest round percentage that gives validation so many samples and training one."""
    for share in _SHARES:
        start = (100 - share) / 100
        train, validation = (0.0, start), (start, 1.0)
        if (
            _samples_in(corpora, validation, seq_length) >= samples
            and _samples_in(corpora, train, seq_length) > 0
        ):
            return share
    return None
