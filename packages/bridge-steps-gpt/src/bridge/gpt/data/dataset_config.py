"""The data of a GPT run: from a path, or none at all, to megatron-core's datasets."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bridge.gpt.data import build as index_files
from bridge.gpt.data.documents import Source, find_source, python_standard_library
from bridge.gpt.data.samples import TokenSamples
from bridge.gpt.data.split_plan import (
    SPLIT_NAMES,
    WHOLE,
    Bounds,
    Corpus,
    SplitPlan,
    check_files,
    check_vocabulary,
    parse_split,
    plan_split,
    read_corpus,
    usual_split,
)
from bridge.gpt.data.tokenizers import Tokenizer, build_tokenizer, identity, vocab_size
from bridge.training.contracts import DataRequest, DataSplits, SizedDataset, wrong_set_name
from bridge.training.local_paths import local_path
from bridge.training.megatron_import import quiet_import
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig as MegatronDatasetConfig

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer

MOCK_TRAIN_SAMPLES = 10_000
"""One pass over mock data."""
MOCK_EVALUATION_SAMPLES = 64
"""The whole of a mock validation or test set."""


@dataclass(kw_only=True)
class GPTDatasetConfig:
    """Next-token samples from text, from token files, or of random tokens."""

    path: str | list[str] | None = local_path()
    """A text file, a directory, a glob, JSON Lines (.jsonl), each also compressed (.gz, .bz2, .xz),
    the prefix of a .bin/.idx pair, or a list of them. Text is tokenized once and cached. Goes
    before standard_library."""
    standard_library: bool = False
    """Without a path: the sources of this Python's standard library, real text on any machine."""
    mock: bool = False
    """Random tokens, for measuring; goes before standard_library."""
    weights: list[float] | None = None
    """Shares of the entries of path in the training samples; in proportion to their sizes if
    None. Validation and test take every sample once."""
    split: str | None = None
    """Shares of train, validation and test, such as 99,1,0; whole documents go to one of them, in
    order. If None two percent are for validation, and more of a small text: what fills a global
    batch, half at most."""
    validation_path: str | list[str] | dict[str, str | list[str]] | None = local_path()
    """As path, for validation alone; split is then not used, all of path is for training. A
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
    """Where tokens and indices are kept; bridge/data in the user's cache directory if None. On
    several nodes a directory that all share."""
    num_dataset_builder_threads: int = 1
    """Threads that index the corpora of a blend."""

    def problems(self, config: "ConfigContainer") -> Iterable[str]:
        """Yield contradictions, and paths that are missing or empty; reads no contents."""
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
        yield from self._path_problems()
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

        Training samples come in megatron-core's order, shuffled by rng.seed, except where one pass
        is asked for (`train_samples` is None): then the loop shuffles each epoch. Validation and
        test are one pass at most, even if more samples are asked for: a repeated sample would
        count twice.

        Raises:
            UsageError: Data is missing, empty, damaged, or too short for one sample of a split.
        """
        if self.mock:
            return self._build_mock(request)
        if request.config.tokenizer is None:
            raise UsageError("tokenizer: real data needs one; set tokenizer.type")
        plans, indices_key, warnings_of_text = on_first_rank(lambda: self._plan_with_key(request))
        for plan in plans.values():
            for prefix in plan.prefixes:
                check_files(prefix)
        tokenizer = build_tokenizer(request.config.tokenizer)
        directory = index_files.cache_directory(self.cache_dir) / "indices" / indices_key
        with index_files.published_by_first_rank(directory) as place:
            sets = {
                name: self._build_set(name, plan, request, tokenizer, place)
                for name, plan in plans.items()
            }
        return DataSplits(
            train=sets["train"],
            validation=_split_of(sets, "validation"),
            test=_split_of(sets, "test"),
            shuffle=request.train_samples is None,
            fingerprint=self._fingerprint(request, plans["train"]),
            notes=_notes(plans),
            warnings=warnings_of_text,
        )

    def sequence_length(self, config: "ConfigContainer") -> int:
        """Tokens of a sample.

        Raises:
            UsageError: Neither the model nor this section has it, or they differ.
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
        entries = len(_entries(self.path))
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

    def _path_problems(self) -> Iterable[str]:
        for field in ("validation_path", "test_path"):
            value = getattr(self, field)
            if isinstance(value, Mapping):
                if not value:
                    yield f"dataset.{field}={{}}: names no set; give one or leave it out"
                for name, path in value.items():
                    if problem := wrong_set_name(name):
                        yield f"dataset.{field}: {problem}"
                    if not _entries(path):
                        yield f"dataset.{field}.{name}: there is no path; give one"
        for field, entries in self._given().values():
            for entry in entries:
                try:
                    find_source(entry, field=field)
                except UsageError as error:
                    yield str(error)

    def _given(self) -> dict[str, tuple[str, list[str]]]:
        """Field and entries of each path that the user gave, by the set that it is for.

        The sets are "train", "validation" and "test", or "validation/NAME" and "test/NAME".
        """
        given: dict[str, tuple[str, list[str]]] = {}
        fields = {"path": "train", "validation_path": "validation", "test_path": "test"}
        for field, split in fields.items():
            value = getattr(self, field)
            if isinstance(value, Mapping):
                for name, path in value.items():
                    given[f"{split}/{name}"] = (f"dataset.{field}.{name}", _entries(path))
            elif entries := _entries(value):
                given[split] = (f"dataset.{field}", entries)
        return given

    def _find_all(self) -> dict[str, list[Source]]:
        """Sources of each set; those of training come first."""
        found = {
            name: [find_source(entry, field=field) for entry in entries]
            for name, (field, entries) in self._given().items()
        }
        if "train" not in found:
            if not self.standard_library:
                raise UsageError("dataset.path: nothing to train on")
            found = {"train": [python_standard_library()], **found}
        return found

    def _plan_with_key(self, request: DataRequest) -> tuple[dict[str, SplitPlan], str, list[str]]:
        """Tokenize what is not cached, plan the splits and name their indices. Runs on rank 0.

        The third is what the start-up lines warn of.
        """
        noticed: list[str] = []
        plans = self._plan(request, noticed)
        return plans, self._indices_key(request, plans), noticed

    def _plan(self, request: DataRequest, noticed: list[str]) -> dict[str, SplitPlan]:
        found = self._find_all()
        with ExitStack() as stack:
            corpora = {
                name: self._corpora(name, sources, request.config, stack, noticed)
                for name, sources in found.items()
            }
            # Too little data ends the block with an error, and then enters no cache.
            return self._plan_splits(corpora, request)

    def _plan_splits(
        self, corpora: dict[str, list[Corpus]], request: DataRequest
    ) -> dict[str, SplitPlan]:
        """Plan each set that the run draws from, by its name."""
        seq_length = self.sequence_length(request.config)
        split = self.split or usual_split(
            corpora["train"],
            seq_length=seq_length,
            validation_samples=request.config.train.global_batch_size,
        )
        bounds: Mapping[str, Bounds | None]
        if len(corpora) > 1:
            bounds = dict.fromkeys(corpora, WHOLE)
        else:
            bounds = dict(zip(SPLIT_NAMES, parse_split(split), strict=True))
        evaluated = {"validation": request.validation_samples, "test": request.test_samples}
        plans: dict[str, SplitPlan] = {}
        for name, cut in bounds.items():
            training = name == "train"
            if cut is None or (not training and evaluated[_split_name(name)] == 0):
                continue
            plans[name] = plan_split(
                name,
                corpora.get(name, corpora["train"]),
                bounds=cut,
                seq_length=seq_length,
                split=split,
                weights=self.weights if training else None,
                size=request.train_samples if training else None,
            )
        return plans

    def _corpora(
        self,
        name: str,
        sources: Sequence[Source],
        config: "ConfigContainer",
        stack: ExitStack,
        noticed: list[str],
    ) -> list[Corpus]:
        """One corpus for each weight; without weights one for all text and one for each pair.

        `noticed` takes what the start-up lines are to warn of.
        """
        assert config.tokenizer is not None
        if name != "train" or self.weights is None:
            prefixes = [prefix for source in sources for prefix in source.prefixes]
            groups = [tuple(file for source in sources for file in source.files)]
            order: list[Any] = [*prefixes, *(group for group in groups if group)]
        else:
            order = []
            for source in sources:
                parts: list[Any] = [*source.prefixes, *([source.files] if source.files else [])]
                if len(parts) != 1:
                    raise UsageError(
                        f"dataset.weights: {source.entry!r} stands for {len(parts)} corpora and "
                        "has one weight; list them one by one"
                    )
                order += parts
        noticed += [f"warning: {name} data: {line}" for s in sources for line in s.not_read]
        vocabulary = vocab_size(config.tokenizer)
        corpora = []
        for part in order:
            if isinstance(part, str):
                corpora.append(read_corpus(part))
                check_vocabulary(part, vocabulary)
                continue
            if config.tokenizer.type == "null":
                raise UsageError(
                    "tokenizer.type=null is for mock data and token files, not for text; set "
                    "tokenizer.type=bytes"
                )
            cached = stack.enter_context(
                index_files.cached_tokens(
                    part,
                    config.tokenizer,
                    index_files.cache_directory(self.cache_dir),
                    json_key=self.json_key,
                )
            )
            noticed += [f"warning: {name} data: {line}" for line in cached.counts.warnings()]
            corpora.append(read_corpus(cached.readable_prefix, name=cached.prefix))
        return corpora

    def _build_set(
        self,
        name: str,
        plan: SplitPlan,
        request: DataRequest,
        tokenizer: Tokenizer,
        directory: Path,
    ) -> SizedDataset:
        weights = None if plan.weights is None else list(plan.weights)
        of_megatron: Any = tokenizer
        config = MegatronDatasetConfig(
            random_seed=request.config.rng.seed,
            sequence_length=self.sequence_length(request.config),
            blend=(list(plan.prefixes), weights),
            split="1,0,0",  # the matrix below is what counts
            num_dataset_builder_threads=self.num_dataset_builder_threads,
            path_to_cache=str(directory),
            tokenizer=of_megatron,
            reset_position_ids=self.reset_position_ids,
            reset_attention_mask=False,
            eod_mask_loss=self.eod_mask_loss,
            create_attention_mask=False,
        )
        # Sizes and weights differ by set, so each is built by itself.
        index = SPLIT_NAMES.index(_split_name(name))
        matrix: list[Any] = [None] * len(SPLIT_NAMES)
        matrix[index] = plan.bounds
        config.split_matrix = matrix
        sizes: list[Any] = [0] * len(SPLIT_NAMES)
        sizes[index] = plan.size
        builder = BlendedMegatronDatasetBuilder(TokenSamples, sizes, lambda: True, config)
        with warnings.catch_warnings():
            # Of padding, which `TokenSamples` does not know by its id.
            warnings.filterwarnings("ignore", "The pad token id")
            dataset: Any = builder.build()[index]
        built: SizedDataset = dataset
        return built

    def _indices_key(self, request: DataRequest, plans: Mapping[str, SplitPlan]) -> str:
        """megatron-core knows its cached indices by the path of the data, not by what it holds."""
        assert request.config.tokenizer is not None
        return index_files.digest(
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
                "tokenizer": identity(request.config.tokenizer),
                "seq_length": self.sequence_length(request.config),
                "seed": request.config.rng.seed,
            }
        )

    def _fingerprint(self, request: DataRequest, plan: SplitPlan) -> str:
        """Names the order of the training samples, wherever their files are."""
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
            f"by {shuffled_by}: {index_files.digest(described)}"
        )

    def _build_mock(self, request: DataRequest) -> DataSplits:
        config = request.config
        if config.tokenizer is not None:
            vocabulary = vocab_size(config.tokenizer)
        else:
            vocabulary = getattr(config.model, "vocab_size", None) or 0
        if vocabulary < 1:
            raise UsageError(
                "dataset.mock=true: neither tokenizer nor model.vocab_size tells the number of "
                "tokens; set tokenizer.type=null tokenizer.vocab_size=N"
            )
        seq_length = self.sequence_length(config)
        wanted = (request.train_samples, request.validation_samples, request.test_samples)
        usual = (MOCK_TRAIN_SAMPLES, MOCK_EVALUATION_SAMPLES, MOCK_EVALUATION_SAMPLES)
        datasets = [
            RandomTokens(
                samples=usual[index] if samples is None else samples,
                seq_length=seq_length,
                vocab_size=vocabulary,
                seed=(config.rng.seed, index),
            )
            for index, samples in enumerate(wanted)
            if samples != 0
        ]
        by_split = {dataset.seed[1]: dataset for dataset in datasets}
        return DataSplits(
            train=by_split.get(0),
            validation=by_split.get(1),
            test=by_split.get(2),
            shuffle=False,
            fingerprint=f"random tokens below {vocabulary}, seed {config.rng.seed}",
            notes={"mock samples": sum(len(dataset) for dataset in datasets)},
        )


class RandomTokens:
    """Samples of uniformly random tokens, each a function of the seed and its index alone."""

    def __init__(
        self, *, samples: int, seq_length: int, vocab_size: int, seed: tuple[int, int]
    ) -> None:
        self.samples = samples
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.seed = seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        generator = np.random.default_rng([*self.seed, index])
        text = torch.from_numpy(generator.integers(self.vocab_size, size=self.seq_length + 1))
        return {
            "tokens": text[:-1].contiguous(),
            "labels": text[1:].contiguous(),
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


def _entries(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _split_name(name: str) -> str:
    """The split that a set belongs to: "validation" for "validation/wiki"."""
    return name.partition("/")[0]


def _split_of(
    sets: Mapping[str, SizedDataset], split: str
) -> SizedDataset | dict[str, SizedDataset] | None:
    """What `DataSplits` has for a split: its one set, or those with names."""
    named = {
        name.partition("/")[2]: dataset
        for name, dataset in sets.items()
        if name.startswith(f"{split}/")
    }
    return named or sets.get(split)


def _notes(plans: Mapping[str, SplitPlan]) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    for name, plan in plans.items():
        notes[f"{name} documents"] = plan.documents
        notes[f"{name} tokens"] = plan.tokens
    return notes
