"""The dataset section of GPT pretraining, which builds megatron-core's datasets."""

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.gpt.data.cache import cache_directory, digest, published_by_first_rank
from bridge.gpt.data.pretraining.corpora import open_corpora
from bridge.gpt.data.pretraining.named_sets import (
    SetPaths,
    list_entries,
    sets_of_split,
    split_of_set,
)
from bridge.gpt.data.pretraining.next_token_samples import TokenSamples, build_samples
from bridge.gpt.data.pretraining.random_tokens import random_splits
from bridge.gpt.data.pretraining.split_plan import (
    SPLIT_NAMES,
    SplitPlan,
    default_split,
    parse_split,
    plan_split,
)
from bridge.gpt.data.token_files import ALL, Bounds, TokenFiles, check_files
from bridge.gpt.data.tokenization.tokenizers import Tokenizer, build_tokenizer, tokenizer_identity
from bridge.training.config import TokenizerConfig
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.local_paths import local_path
from bridge.training.megatron_import import quiet_import
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig as MegatronDatasetConfig

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


@dataclass(kw_only=True)
class GPTDatasetConfig:
    """Next-token samples from text, from token files, or of random tokens."""

    path: str | list[str] | None = local_path()
    """A text file, a directory, a glob, JSON Lines (.jsonl), each also compressed (.gz, .bz2, .xz),
    the prefix of a .bin/.idx pair, or a list of them. Text is tokenized once and cached. Takes
    precedence over standard_library."""
    standard_library: bool = False
    """Without a path: the sources of this Python's standard library, real text on any machine."""
    mock: bool = False
    """Random tokens, for measurements; takes precedence over standard_library."""
    weights: list[float] | None = None
    """Shares of the entries of path in the training samples. If None, in proportion to their
    sizes. Validation and test take every sample once."""
    split: str | None = None
    """Shares of train, validation and test, such as 99,1,0; whole documents go to one of them, in
    order. If None, two percent are for validation, and more of a small text: as much as fills a
    global batch, half at most."""
    validation_path: str | list[str] | dict[str, str | list[str]] | None = local_path()
    """As path, for validation alone; split is then not used, and all of path is for training. A
    mapping makes several sets: {wiki: wiki.txt, code: [a.py, b.py]} is evaluated as wiki and as
    code."""
    test_path: str | list[str] | dict[str, str | list[str]] | None = local_path()
    """As validation_path, for test."""
    json_key: str = "text"
    """Key of the text in a line of JSON Lines; other keys are not read."""
    seq_length: int | None = None
    """Tokens of a sample; model.seq_length if None."""
    reset_position_ids: bool = False
    """Count positions from 0 again after each end of document."""
    eod_mask_loss: bool = False
    """Leave the token after an end of document out of the loss."""
    cache_dir: str | None = local_path()
    """Directory of cached tokens and indices; bridge/data in the user's cache directory if None. On
    several nodes, a directory that all share."""
    num_dataset_builder_threads: int = 1
    """Threads that index the corpora of a blend."""

    def problems(self, config: "ConfigContainer") -> Iterable[str]:
        """Yield contradictions, and paths that are missing or empty; no contents are read."""
        for field in ("path", "validation_path", "test_path"):
            if self.mock and getattr(self, field) is not None:
                yield f"dataset.mock=true and dataset.{field}: there is either; leave one out"
        if not (self.mock or self.path or self.standard_library):
            yield (
                "dataset.path: nothing to train on; give a text file, a directory, a glob or the "
                "prefix of a .bin/.idx pair (or dataset.mock=true)"
            )
        yield from self._weights_problems()
        if self.num_dataset_builder_threads < 1:
            yield (
                f"dataset.num_dataset_builder_threads={self.num_dataset_builder_threads}: "
                "at least one is needed; leave it out"
            )
        if config.tokenizer is None and not self.mock:
            yield "tokenizer: real data needs one; set tokenizer.type (bytes needs no files)"
        yield from self._set_paths().problems()
        for check in (
            lambda: self.sequence_length(config),
            lambda: self.split is None or parse_split(self.split),
        ):
            try:
                check()
            except UsageError as error:
                yield str(error)

    def build(self, request: DataRequest) -> DataSplits:
        """Build the splits; every rank calls it, and rank 0 does the tokenizing.

        Training samples come in megatron-core's order, shuffled by rng.seed. If one pass is asked
        for (`train_samples` is None), the loop shuffles each epoch instead. Validation and test are
        one pass at most, even if more samples are asked for: a repeated sample would count twice.

        Raises:
            UsageError: Data is missing, empty, damaged, or too short for one sample of a split.
        """
        if self.mock:
            return random_splits(request, seq_length=self.sequence_length(request.config))
        tokenizer_config = request.config.tokenizer
        if tokenizer_config is None:
            raise UsageError("tokenizer: real data needs one; set tokenizer.type")
        plans, indices_key, warning_lines = on_first_rank(
            lambda: self._plan(request, tokenizer_config)
        )
        for plan in plans.values():
            for prefix in plan.prefixes:
                check_files(prefix)
        tokenizer = build_tokenizer(tokenizer_config)
        final = cache_directory(self.cache_dir) / "indices" / indices_key
        with published_by_first_rank(final) as directory:
            sets = {
                name: build_samples(
                    self._megatron_config(plan, request, tokenizer, directory),
                    plan,
                    split=split_of_set(name),
                )
                for name, plan in plans.items()
            }
        return DataSplits(
            train=sets["train"],
            validation=sets_of_split(sets, "validation"),
            test=sets_of_split(sets, "test"),
            shuffle=request.train_samples is None,
            fingerprint=self._fingerprint(request, plans["train"]),
            notes=_notes(plans),
            warnings=warning_lines,
        )

    def sequence_length(self, config: "ConfigContainer") -> int:
        """Return the number of tokens of a sample.

        Raises:
            UsageError: Neither the model nor this section has it, or the two differ.
        """
        of_model = getattr(config.model, "seq_length", None)
        length = of_model if self.seq_length is None else self.seq_length
        if length is None:
            raise UsageError("dataset.seq_length: the model has no seq_length; give it here")
        if length < 1:
            raise UsageError(f"dataset.seq_length={length}: a sample has at least one token")
        if of_model is not None and length != of_model:
            raise UsageError(
                f"dataset.seq_length={length} and model.seq_length={of_model}: they must be "
                "equal; set model.seq_length alone"
            )
        return int(length)

    def _weights_problems(self) -> Iterable[str]:
        if self.weights is None:
            return
        entries = len(list_entries(self.path))
        if len(self.weights) != entries:
            yield (
                f"dataset.weights: {len(self.weights)} weights for {entries} paths; give one for "
                "each entry of dataset.path, or none"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            yield (
                f"dataset.weights={self.weights}: each must be above 0; leave out the paths that "
                "are not wanted"
            )

    def _set_paths(self) -> SetPaths:
        return SetPaths(
            path=self.path,
            validation_path=self.validation_path,
            test_path=self.test_path,
            standard_library=self.standard_library,
        )

    def _plan(
        self, request: DataRequest, tokenizer: TokenizerConfig
    ) -> tuple[dict[str, SplitPlan], str, list[str]]:
        """Tokenize what is not cached and plan the splits. Runs on rank 0.

        Returns:
            The plan of each set that the run draws from, the key of their indices in the cache,
            and the warnings for the startup messages.
        """
        corpora: dict[str, list[TokenFiles]] = {}
        warning_lines: list[str] = []
        with ExitStack() as stack:
            for name, sources in self._set_paths().find_sources().items():
                corpora[name], lines = open_corpora(
                    sources,
                    has_weights=name == "train" and self.weights is not None,
                    tokenizer=tokenizer,
                    cache_dir=cache_directory(self.cache_dir),
                    json_key=self.json_key,
                    stack=stack,
                )
                warning_lines += [f"warning: {name} data: {line}" for line in lines]
            # Too little data raises here, and then nothing enters the cache.
            plans = self._plan_splits(corpora, request)
        return plans, self._indices_key(request, tokenizer, plans), warning_lines

    def _plan_splits(
        self, corpora: dict[str, list[TokenFiles]], request: DataRequest
    ) -> dict[str, SplitPlan]:
        """Return the plan of each set that the run draws from, by its name."""
        seq_length = self.sequence_length(request.config)
        split = self.split or default_split(
            corpora["train"],
            seq_length=seq_length,
            validation_samples=request.config.train.global_batch_size,
        )
        bounds: Mapping[str, Bounds | None]
        if len(corpora) > 1:
            bounds = dict.fromkeys(corpora, ALL)
        else:
            bounds = dict(zip(SPLIT_NAMES, parse_split(split), strict=True))
        evaluated = {"validation": request.validation_samples, "test": request.test_samples}
        plans: dict[str, SplitPlan] = {}
        for name, cut in bounds.items():
            is_training = name == "train"
            if cut is None or (not is_training and evaluated[split_of_set(name)] == 0):
                continue
            plans[name] = plan_split(
                name,
                corpora.get(name, corpora["train"]),
                bounds=cut,
                seq_length=seq_length,
                split=split,
                weights=self.weights if is_training else None,
                size=request.train_samples if is_training else None,
            )
        return plans

    def _megatron_config(
        self, plan: SplitPlan, request: DataRequest, tokenizer: Tokenizer, directory: Path
    ) -> MegatronDatasetConfig:
        weights = None if plan.weights is None else list(plan.weights)
        # megatron-core annotates a class of its own and takes any object with these methods.
        any_tokenizer: Any = tokenizer
        return MegatronDatasetConfig(
            random_seed=request.config.rng.seed,
            sequence_length=self.sequence_length(request.config),
            blend=(list(plan.prefixes), weights),
            split="1,0,0",  # `build_samples` sets the matrix
            num_dataset_builder_threads=self.num_dataset_builder_threads,
            path_to_cache=str(directory),
            tokenizer=any_tokenizer,
            reset_position_ids=self.reset_position_ids,
            reset_attention_mask=False,
            eod_mask_loss=self.eod_mask_loss,
            create_attention_mask=False,
        )

    def _indices_key(
        self, request: DataRequest, tokenizer: TokenizerConfig, plans: Mapping[str, SplitPlan]
    ) -> str:
        # megatron-core finds its cached indices by the path of the data, not by its contents.
        return digest(
            {
                "class": TokenSamples.__name__,
                "plans": {
                    name: [plan.prefixes, plan.bounds, plan.weights, plan.size]
                    for name, plan in plans.items()
                },
                "data": [
                    [os.path.getsize(f"{prefix}.bin"), *_size_and_time(f"{prefix}.idx")]
                    for plan in plans.values()
                    for prefix in plan.prefixes
                ],
                "tokenizer": tokenizer_identity(tokenizer),
                "seq_length": self.sequence_length(request.config),
                "seed": request.config.rng.seed,
            }
        )

    def _fingerprint(self, request: DataRequest, plan: SplitPlan) -> str:
        """Return a name for the order of the training samples, wherever their files are."""
        shuffled_by = "the loop" if request.train_samples is None else "megatron-core"
        described = {
            "corpora": plan.corpora_digest,
            "bounds": plan.bounds,
            "weights": plan.weights,
            "size": plan.size,
            "seed": request.config.rng.seed,
        }
        return (
            f"{plan.samples} samples of {self.sequence_length(request.config)} tokens, shuffled "
            f"by {shuffled_by}: {digest(described)}"
        )


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _notes(plans: Mapping[str, SplitPlan]) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    for name, plan in plans.items():
        notes[f"{name} documents"] = plan.documents
        notes[f"{name} tokens"] = plan.tokens
    return notes
