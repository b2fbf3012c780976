"""The dataset section of fine-tuning: rows of prompts and answers, with a loss on the answers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bridge.gpt.data.cache import cache_directory, digest, file_state, published_by_first_rank
from bridge.gpt.data.sft.batches import (
    PackedSamples,
    PaddedBatch,
    SingleSamples,
    count_tokens,
    round_up,
)
from bridge.gpt.data.sft.corpus import (
    FORMAT,
    Corpus,
    CorpusCounts,
    CorpusWriter,
    Truncation,
    is_corpus,
    read_corpus,
)
from bridge.gpt.data.sft.packing import plan_packing
from bridge.gpt.data.sft.rendering import LossOn, Renderer
from bridge.gpt.data.sft.rows.conversations import RowKeys
from bridge.gpt.data.sft.rows.docstring_rows import DocstringRows
from bridge.gpt.data.sft.rows.row_files import (
    RowSource,
    StoredRows,
    find_rows,
    reject_missing_library,
)
from bridge.gpt.data.sft.sample_lengths import (
    multiple_of_layout,
    needs_equal_lengths,
    packing_problems,
    sample_length,
)
from bridge.gpt.data.sft.startup_messages import collect_notes, collect_warnings
from bridge.gpt.data.tokenization.tokenizers import build_tokenizer, tokenizer_identity
from bridge.training.config import TokenizerConfig
from bridge.training.contracts import TOKENS, DataRequest, DataSplits, SizedDataset
from bridge.training.local_paths import local_path
from bridge.training.ranks.collectives import on_first_rank
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


@dataclass(kw_only=True)
class SFTDatasetConfig:
    """Samples of prompts and answers, or of chats; the loss is on the assistant's turns."""

    path: str | None = local_path()
    """A JSON Lines file; a directory with training.jsonl, validation.jsonl and test.jsonl, of which
    the first is needed; or a Hugging Face dataset as save_to_disk wrote it. Takes precedence over
    standard_library."""
    validation_path: str | None = local_path()
    """Rows for validation, in place of those in path; a file, or data with a training split."""
    test_path: str | None = local_path()
    """As validation_path, for test."""
    standard_library: bool = False
    """Without a path: signatures and summaries of this Python's standard library."""
    prompt_key: str = "prompt"
    """Key of a row's prompt."""
    completion_key: str = "completion"
    """Key of the answer to the prompt."""
    messages_key: str = "messages"
    """Key of a row's chat: a list of objects with role and content. "conversations", with from and
    value, is read too."""
    ignore_keys: list[str] = field(default_factory=list)
    """Keys of rows and of turns that are ignored. Other keys that are not read, such as tools,
    reasoning_content or weight, are an error."""
    chat_template: Literal["plain", "tokenizer"] = "plain"
    """plain: prompt and completion unchanged, a chat with a line <|role|> before each turn, and the
    end-of-document token after each answer. tokenizer: a Hugging Face tokenizer's own."""
    loss_on: LossOn = "assistant"
    """Tokens that count in the loss: all turns of the assistant, each with the token that ends it;
    its last answer alone; or all tokens, those of prompts too."""
    truncation: Truncation = "right"
    """Cut of a row that is longer than model.seq_length: right removes its end, left its beginning,
    drop the whole row."""
    packing: bool = False
    """Put several samples into one sequence of model.seq_length tokens, as documents that do not
    see each other; needs train.micro_batch_size=1."""
    pad_to_multiple_of: int = 1
    """Pad microbatches, and each document of a packed sequence, to a multiple of so many tokens;
    more where the parallel layout needs it."""
    cache_dir: str | None = local_path()
    """Directory of cached tokens; bridge/data in the user's cache directory if None. On several
    nodes, a directory that all share."""

    def problems(self, config: "ConfigContainer") -> Iterable[str]:
        """Yield contradictions, and paths without rows; no rows are read."""
        if not (self.path or self.standard_library):
            yield (
                "dataset.path: nothing to train on; give a JSON Lines file, a directory with "
                "training.jsonl, or a Hugging Face dataset on disk"
            )
        if config.tokenizer is None or config.tokenizer.type == "null":
            yield "tokenizer: rows of text need one; set tokenizer.type (bytes needs no files)"
        elif self.chat_template == "tokenizer" and config.tokenizer.type != "huggingface":
            yield (
                f"dataset.chat_template=tokenizer: tokenizer.type={config.tokenizer.type} has no "
                "chat template; set dataset.chat_template=plain or tokenizer.type=huggingface"
            )
        try:
            self._sources()
        except UsageError as error:
            yield str(error)
        yield from self._length_problems(config)
        if self.packing:
            yield from packing_problems(config)

    def build(self, request: DataRequest) -> DataSplits:
        """Build the splits; every rank calls it, and rank 0 does the tokenizing.

        A sample is a row, cut to model.seq_length tokens, or a sequence of rows with packing. The
        loop shuffles the samples each epoch.

        Raises:
            UsageError: A row is malformed, or no row of a split is left.
        """
        config = request.config
        wanted = {"validation": request.validation_samples, "test": request.test_samples}
        corpora = {
            name: self._corpus(source, config)
            for name, source in self._sources().items()
            if wanted.get(name) != 0
        }
        multiple = lcm(self.pad_to_multiple_of, multiple_of_layout(config, packed=self.packing))
        padding = build_tokenizer(_tokenizer_of(config)).eod
        length = sample_length(config)
        sets: dict[str, SizedDataset] = {}
        collate: PaddedBatch | None = None
        if self.packing:
            for name, corpus in corpora.items():
                plan = plan_packing(
                    [round_up(tokens, multiple) for tokens in corpus.predictions().tolist()],
                    length,
                    seed=config.rng.seed if name == "train" else None,
                )
                sets[name] = PackedSamples(
                    corpus=corpus, plan=plan, length=length, multiple=multiple, padding=padding
                )
        else:
            sets.update({name: SingleSamples(corpus=c) for name, c in corpora.items()})
            fixed = length if needs_equal_lengths(config) else None
            collate = PaddedBatch(multiple=multiple, padding=padding, length=fixed)
        return DataSplits(
            train=sets["train"],
            validation=sets.get("validation"),
            test=sets.get("test"),
            collate=collate,
            fingerprint=self._fingerprint(config, corpora["train"], len(sets["train"]), multiple),
            notes=collect_notes(
                corpora, {n: len(s) for n, s in sets.items()} if self.packing else {}
            ),
            warnings=collect_warnings(corpora, self.ignore_keys),
            items={TOKENS: count_tokens},
        )

    def _sources(self) -> dict[str, RowSource]:
        """Return the rows of each split.

        Raises:
            UsageError: There are none for training, or they need a package that is missing.
        """
        if self.path is None:
            found: dict[str, RowSource] = {
                "train": DocstringRows(split="train"),
                "validation": DocstringRows(split="validation"),
            }
        else:
            found = dict(self._stored(self.path, "dataset.path"))
        for split, path in (("validation", self.validation_path), ("test", self.test_path)):
            if path is not None:
                field = f"dataset.{split}_path"
                stored = self._stored(path, field)
                source = stored.get(split) or stored.get("train")
                if source is None:
                    raise UsageError(f"{field}={path!r}: holds neither {split} nor training rows")
                found[split] = source
        if "train" not in found:
            raise UsageError(
                f"dataset.path={self.path!r}: holds rows for {' and '.join(found)} and none for "
                "training; add training.jsonl"
            )
        return found

    def _stored(self, path: str, field: str) -> dict[str, StoredRows]:
        keys = RowKeys(
            prompt=self.prompt_key,
            completion=self.completion_key,
            messages=self.messages_key,
            ignored=tuple(self.ignore_keys),
        )
        found = find_rows(path, field, keys)
        for source in found.values():
            reject_missing_library(source, field)
        return found

    def _corpus(self, source: RowSource, config: "ConfigContainer") -> Corpus:
        """Return the samples of a split, from the cache if it has them.

        Raises:
            UsageError: A row is malformed, none is left, or this rank does not see the cache.
        """
        key = on_first_rank(lambda: self._key(source, config))
        directory = cache_directory(self.cache_dir) / "sft" / key
        with published_by_first_rank(directory) as place:
            on_first_rank(lambda: self._write(source, config, place))
            return read_corpus(place)

    def _key(self, source: RowSource, config: "ConfigContainer") -> str:
        """Return the key of a corpus in the cache: its rows, and how they are rendered and cut."""
        return digest(
            {
                "format": FORMAT,
                "rows": repr(source),
                "files": [file_state(file) for file in source.files()],
                "tokenizer": tokenizer_identity(_tokenizer_of(config)),
                "rendered": [self.chat_template, self.loss_on],
                "cut": [self.truncation, sample_length(config)],
            }
        )

    def _write(self, source: RowSource, config: "ConfigContainer", directory: Path) -> None:
        """Write a corpus to a directory, unless it is there."""
        if is_corpus(directory):
            return
        render = Renderer(
            build_tokenizer(_tokenizer_of(config)),
            template=self.chat_template,
            loss_on=self.loss_on,
        )
        writer = CorpusWriter(sample_length(config), self.truncation)
        writer.report.ignored_keys = source.check()
        for conversation in source.conversations():
            writer.add(render(conversation))
        if writer.report.samples == 0:
            raise UsageError(_nothing_left(source, writer.report, sample_length(config)))
        writer.write(directory)

    def _fingerprint(
        self, config: "ConfigContainer", corpus: Corpus, samples: int, multiple: int
    ) -> str:
        """Return a name for the order of the training samples, wherever their files are."""
        described = {
            "corpus": corpus.digest,
            "packed": [sample_length(config), multiple] if self.packing else None,
            "seed": config.rng.seed,
        }
        kind = "packed sequences" if self.packing else "samples"
        return f"{samples} {kind}, shuffled by the loop: {digest(described)}"

    def _length_problems(self, config: "ConfigContainer") -> Iterator[str]:
        try:
            length = sample_length(config)
        except UsageError as error:
            yield str(error)
            return
        multiple = self.pad_to_multiple_of
        if multiple < 1 or length % multiple:
            yield (
                f"dataset.pad_to_multiple_of={multiple} must be at least 1 and divide "
                f"model.seq_length={length}"
            )


def _tokenizer_of(config: "ConfigContainer") -> TokenizerConfig:
    if config.tokenizer is None:
        raise UsageError("tokenizer: rows of text need one; set tokenizer.type")
    return config.tokenizer


def _nothing_left(source: RowSource, report: CorpusCounts, length: int) -> str:
    if not report.dropped_too_long and not report.dropped_without_answer:
        return f"dataset: {source.files()[0]} has no row; give a file with a row a line"
    return (
        f"dataset: no row of {source.files()[0]} is left: {report.dropped_too_long} are longer "
        f"than model.seq_length={length} (dataset.truncation=drop), and in "
        f"{report.dropped_without_answer} nothing within it counts in the loss; raise "
        "model.seq_length, or keep the answers with dataset.truncation=left"
    )
