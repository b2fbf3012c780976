"""The plan of a split: its documents, and the number of samples in them.

It is made before megatron-core sees the data. On an empty split megatron-core counts epochs
forever, and a sequence longer than the data fails deep inside it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bridge.gpt.data.token_files import ALL, Bounds, TokenFiles
from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

SPLIT_NAMES = ("train", "validation", "test")

_SHARES = (2, 5, 10, 20, 30, 50)
"""Shares of the documents for validation, in percent."""


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """The documents and samples of one split, as megatron-core's builder takes them."""

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
    """Digest of the lengths of the documents of all its corpora."""


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


def default_split(
    corpora: Sequence[TokenFiles], *, seq_length: int, validation_samples: int
) -> str:
    """Return a dataset.split with two percent for validation, or more of a small corpus.

    The share is large enough for `validation_samples`, but half at most. If half is too little,
    `plan_split` reports it.
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

    A corpus whose share is too small for one sample is skipped, unless the user gave it a weight.

    Args:
        name: "train", "validation" or "test"; "validation/NAME" if there are several.
        corpora: The corpora that the split is cut from.
        bounds: The documents of each corpus that belong to the split.
        seq_length: Tokens of a sample; it reads one more, for the last label.
        split: The user's dataset.split, for the messages.
        weights: Shares of the corpora, as the user gave them.
        size: Samples that will be drawn; None for one pass.

    Raises:
        UsageError: There is not one sample, or not one of a corpus that has a weight.
    """
    samples = [_samples_in(corpus, bounds, seq_length) for corpus in corpora]
    if not any(samples):
        raise UsageError(_too_little(name, corpora, bounds, seq_length, split))
    if weights is not None and not all(samples):
        prefix = corpora[samples.index(0)].prefix
        raise UsageError(
            f"dataset.weights: the {name} split of {prefix} has no sample of "
            f"model.seq_length={seq_length} tokens; leave that path out"
        )
    kept = [index for index, count in enumerate(samples) if count]
    one_pass = sum(samples)
    blend: tuple[float, ...] | None = None
    if len(kept) == 1:
        # Up to one pass, the order does not depend on how much of it is drawn.
        drawn = size if size is not None and size > one_pass else None
    elif weights is not None:
        blend, drawn = tuple(weights[index] for index in kept), size or one_pass
    else:
        drawn = size
        if size is not None:
            # Without weights megatron-core would stop after one pass over a blend.
            blend = tuple(float(samples[index]) for index in kept)
    return SplitPlan(
        prefixes=tuple(corpora[index].prefix for index in kept),
        bounds=bounds,
        documents=_documents_in(corpora, bounds),
        tokens=_tokens_in(corpora, bounds),
        samples=one_pass,
        weights=blend,
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
    tokens_in_all = _tokens_in(corpora, ALL)
    if tokens_in_all <= seq_length:
        return (
            f"model.seq_length={seq_length}: the {name} data holds {tokens_in_all} tokens in all "
            f"and one sample needs {seq_length + 1}; give more text or a shorter sequence"
        )
    message = (
        f"dataset.split={split!r}: the {name} split gets {_documents_in(corpora, bounds)} of "
        f"{_documents_in(corpora, ALL)} documents, {_tokens_in(corpora, bounds)} tokens, and one "
        f"sample of model.seq_length={seq_length} needs {seq_length + 1}; "
    )
    if name != "validation":
        return message + "give it a larger share, more text or a shorter sequence"
    off = "or turn evaluation off with validation.eval_iters=0"
    share = _sufficient_share(corpora, seq_length, samples=1)
    if share is None:
        return message + f"give more text or a shorter sequence, {off}"
    return message + f"set dataset.split={100 - share},{share},0 {off}"


def _sufficient_share(corpora: Sequence[TokenFiles], seq_length: int, samples: int) -> int | None:
    """Return the smallest share in `_SHARES` that is enough for validation.

    Validation then has at least so many samples, and training has one. None if no share is enough.
    """
    for share in _SHARES:
        start = (100 - share) / 100
        train, validation = (
            sum(_samples_in(corpus, bounds, seq_length) for corpus in corpora)
            for bounds in ((0.0, start), (start, 1.0))
        )
        if validation >= samples and train > 0:
            return share
    return None


def _samples_in(corpus: TokenFiles, bounds: Bounds, seq_length: int) -> int:
    # The last sample needs one more token, for its last label.
    return max(0, corpus.tokens_within(bounds) - 1) // seq_length


def _documents_in(corpora: Sequence[TokenFiles], bounds: Bounds) -> int:
    return sum(len(corpus.lengths_within(bounds)) for corpus in corpora)


def _tokens_in(corpora: Sequence[TokenFiles], bounds: Bounds) -> int:
    return sum(corpus.tokens_within(bounds) for corpus in corpora)
