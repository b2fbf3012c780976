"""Which samples a rank sees, and when.

The order of the samples is a function of the seed and the dataset alone, and the position in it is
the number of samples consumed: that one number resumes a run exactly, at no cost. A global batch is
cut into microbatches of consecutive samples, and microbatch k goes to data-parallel rank k mod D.
So every layout trains on the same samples at the same step, in the same microbatches. Modules on
ranks of their own cut each D microbatches into as many parts as the module has copies
(`bridge.training.contracts.DataShard`), so all of them see the same samples as well.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler, Subset

from bridge.training.config import ConfigContainer
from bridge.training.contracts import DataRequest, DataSplits, ModelRanks, SizedDataset, named_sets
from bridge.training.data.evaluation_plan import EvaluationCall, plan_of_run
from bridge.training.data.loader_errors import RejectingCollate, RejectingDataset, raised
from bridge.training.data.loader_workers import LoaderWorkers, prepare_worker
from bridge.training.data.run_length import last_step, samples_to_draw, schedule_samples
from bridge.training.ranks.groups import Ranks
from bridge.training.state import TrainState
from bridge.training.usage_error import UsageError


def data_request(
    config: ConfigContainer,
    modules: frozenset[str] | None = None,
    done: TrainState | None = None,
) -> DataRequest:
    """Return how much data a run draws, from its resolved configuration.

    Args:
        config: The run.
        modules: The modules whose inputs this rank reads; None for all.
        done: What it has done already; None for a new run.

    Raises:
        UsageError: More is done than the configuration asks for.
    """
    train, eval_iters = config.train, config.validation.eval_iters
    evaluated = None if eval_iters is None else eval_iters * train.global_batch_size
    return DataRequest(
        config=config,
        train_samples=samples_to_draw(train, done or TrainState()),
        validation_samples=evaluated,
        test_samples=evaluated,
        modules=modules,
    )


def as_splits(built: DataSplits | Sequence[SizedDataset | None]) -> DataSplits:
    """Return what ``dataset.build`` gave as `DataSplits`; a sequence is train, validation, test."""
    if isinstance(built, DataSplits):
        return built
    if not isinstance(built, Sequence) or not 1 <= len(built) <= 3:
        raise UsageError(
            "dataset.build: expected DataSplits or a sequence of train, validation and test data, "
            f"got {type(built).__name__}"
        )
    train, validation, test = [*built, None, None][:3]
    return DataSplits(train=train, validation=validation, test=test)


def cut_to_the_smallest(
    splits: DataSplits, control_group: dist.ProcessGroup
) -> tuple[DataSplits, list[str]]:
    """Cut each set to the size that it has on the rank where it is smallest.

    Ranks that know other sizes would draw other samples than the order says, and end at different
    times. A collective over all ranks.

    Args:
        splits: What this rank's dataset built.
        control_group: All ranks, over gloo.

    Returns:
        The splits, and a line for each set that was cut on some rank.

    Raises:
        UsageError: One rank has data that another has not; on every rank.
    """
    everyone: list[dict[str, int]] = [{}] * control_group.size()
    dist.all_gather_object(everyone, _sizes(splits), group=control_group)
    notes, smallest = [], {}
    for name in dict.fromkeys(name for sizes in everyone for name in sizes):
        sizes = [sizes_of_rank.get(name, 0) for sizes_of_rank in everyone]
        low, high = min(sizes), max(sizes)
        if low == high:
            continue
        described = (
            f"{name} data has {low} samples on rank {sizes.index(low)} and {high} on rank "
            f"{sizes.index(high)}"
        )
        if low == 0:
            raise UsageError(f"dataset: {described}; build the same splits on every rank")
        smallest[name] = low
        notes.append(f"warning: {described}: the first {low} count on every rank")

    if not smallest:
        return splits, notes

    def cut(name: str, dataset: Any) -> Any:
        return Subset(dataset, range(smallest[name])) if name in smallest else dataset

    def cut_all(split: Literal["validation", "test"]) -> Any:
        data = getattr(splits, split)
        if isinstance(data, Mapping):
            return {name: cut(f"{split}/{name}", dataset) for name, dataset in data.items()}
        return cut(split, data)

    cut_splits = dataclasses.replace(
        splits,
        train=cut("train", splits.train),
        validation=cut_all("validation"),
        test=cut_all("test"),
    )
    return cut_splits, notes


def _sizes(splits: DataSplits) -> dict[str, int]:
    sizes = {"train": 0 if splits.train is None else len(splits.train)}
    for split in ("validation", "test"):
        sets = named_sets(split, getattr(splits, split))
        sizes |= {name: len(dataset) for name, dataset in sets.items()}
    return sizes


class SampleOrder:
    """The endless order in which the samples of a dataset are drawn.

    Args:
        size: Number of samples of the dataset.
        shuffle: Draw a new permutation each epoch, from the seed and the epoch's number.
        seed: Seed of the permutations.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int) -> None:
        self.size = size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if not self._shuffle:
            return offset
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._permutation = torch.randperm(self.size, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[offset]

    @property
    def fingerprint(self) -> str:
        """Names the order: equal fingerprints draw equal samples."""
        order = f"shuffled with seed {self._seed}" if self._shuffle else "in the dataset's order"
        return f"{self.size} samples {order}"


class MicrobatchSampler(Sampler[list[int]]):
    """Yields the indices of this rank's microbatches, from a position on, for ever.

    Args:
        order: The order of the samples.
        start: Samples consumed before.
        micro_batch_size: Samples of a microbatch.
        data_parallel_rank: This rank's place among the data-parallel ranks.
        data_parallel_size: Number of data-parallel ranks.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        start: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self._order = order
        self._start = start
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size

    def __iter__(self) -> Iterator[list[int]]:
        stride = self._micro_batch_size * self._size
        for block in itertools.count(self._start, stride):
            first = block + self._rank * self._micro_batch_size
            yield [self._order[first + i] for i in range(self._micro_batch_size)]


class EvaluationSampler(Sampler[list[int]]):
    """Yields the indices of this rank's microbatches of an evaluation.

    Args:
        batches: What `bridge.training.data.evaluation_plan.plan_of_run` says.
        ranks: How the model is divided over the ranks.
    """

    def __init__(self, batches: Sequence[Sequence[EvaluationCall]], ranks: ModelRanks) -> None:
        self._batches = batches
        self._ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            for call in batch:
                yield from call.positions(self._ranks.shard(call.size))


class RunData:
    """The data of one run, as this rank draws it; building it is a collective over all ranks.

    Args:
        splits: What the dataset built on this rank.
        config: The resolved configuration.
        ranks: The process groups.
        done: What the run has done already; None for a new run.
    """

    def __init__(
        self,
        splits: DataSplits,
        config: ConfigContainer,
        ranks: Ranks,
        done: TrainState | None = None,
    ) -> None:
        splits, cuts = cut_to_the_smallest(splits, ranks.control_group)
        self.warnings = [*splits.warnings, *cuts]
        self.splits = splits
        self.workers = LoaderWorkers(config.train.num_workers)
        """The data loading processes of this rank."""
        self._config = config
        self._ranks = ranks
        if splits.train is None or len(splits.train) == 0:
            raise UsageError(
                "dataset: there is no training data; give the training split at least "
                f"{config.train.global_batch_size} samples (train.global_batch_size)"
            )
        self._order = SampleOrder(len(splits.train), shuffle=splits.shuffle, seed=config.rng.seed)
        done, size = done or TrainState(), len(splits.train)
        self.train_iters = last_step(config.train, size, done)
        self.schedule_samples = schedule_samples(config.train, size, done)
        self._items = dict.fromkeys(splits.items, 0)
        # A set that cannot be evaluated is found now, not when training is over.
        for split in ("validation", "test"):
            for name, dataset in self.sets(split).items():
                if len(dataset) == 0 and config.validation.eval_iters != 0:
                    raise UsageError(
                        f"{name} data: it has no samples; enlarge it or leave it away, or turn "
                        "evaluation off with validation.eval_iters=0"
                    )

    @property
    def fingerprint(self) -> str:
        """Names the order of the training samples; saved with checkpoints."""
        return self.splits.fingerprint or self._order.fingerprint

    def training(self, consumed_samples: int) -> list[Iterator[Any]]:
        """Return one endless iterator a model chunk over this rank's training microbatches."""
        iterators = [
            self._iterator(
                self.splits.train, self._training_sampler(consumed_samples), consumed_samples
            )
            for _ in range(self._ranks.layout.virtual_pipeline or 1)
        ]
        if self._items and self._counts_items():
            iterators[-1] = self._counting(iterators[-1])
        return iterators

    def take_items(self) -> dict[str, int]:
        """Return what training has read of `DataSplits.items` since the last call, over all ranks.

        A collective, of the hosts, where the data counts anything.
        """
        if not self._items:
            return {}
        counts = torch.tensor(list(self._items.values()))
        dist.all_reduce(counts, group=self._ranks.control_group)
        self._items = dict.fromkeys(self._items, 0)
        return dict(zip(self._items, counts.tolist(), strict=True))

    def _counts_items(self) -> bool:
        """Whether this rank counts: of those that read the same samples, one."""
        groups = self._ranks.model.groups
        return self._ranks.model.is_last_stage and groups.tp.rank() == 0 and groups.cp.rank() == 0

    def _counting(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for microbatch in iterator:
            for name, count in self.splits.items.items():
                self._items[name] += count(microbatch)
            yield microbatch

    def sets(self, split: str) -> dict[str, SizedDataset]:
        """Return the sets of a split by the names under which results stand (`named_sets`)."""
        return named_sets(split, getattr(self.splits, split))

    def set_named(self, name: str) -> SizedDataset:
        """Return the set "validation", "validation/NAME", "test" or "test/NAME".

        Raises:
            UsageError: There is no such set.
        """
        sets = {**self.sets("validation"), **self.sets("test")}
        if name not in sets:
            raise UsageError(f"there is no {name!r} data; there is {', '.join(sets) or 'none'}")
        return sets[name]

    def evaluation_samples(self, dataset: SizedDataset) -> int:
        """Return how many samples one evaluation of a set draws, over all ranks."""
        eval_iters, size = self._config.validation.eval_iters, len(dataset)
        if eval_iters is None:
            return size
        return min(size, eval_iters * self._config.train.global_batch_size)

    @property
    def smallest_microbatch(self) -> int:
        """Samples of which every microbatch of a replica holds a multiple, 1 in most layouts."""
        return self._ranks.model.smallest_microbatch

    def evaluation(
        self, dataset: SizedDataset, num_samples: int | None = None
    ) -> tuple[list[Iterator[Any]], int]:
        """Return one iterator a model chunk over an evaluation's microbatches, and its samples.

        Args:
            dataset: The set; it is drawn from its beginning.
            num_samples: Samples over all ranks; those of an evaluation if None.

        Raises:
            UsageError: The set has fewer samples.
        """
        if num_samples is None:
            num_samples = self.evaluation_samples(dataset)
        elif not 0 < num_samples <= len(dataset):
            raise UsageError(
                f"num_samples={num_samples}: the set has {len(dataset)} samples; give a number "
                f"from 1 to {len(dataset)}"
            )
        chunks = self._ranks.layout.virtual_pipeline or 1
        batches = plan_of_run(
            self._config, self._ranks.model, num_samples, is_interleaved=chunks > 1
        )
        sampler = EvaluationSampler(batches, self._ranks.model)
        return [self._iterator(dataset, sampler, 0) for _ in range(chunks)], num_samples

    def _training_sampler(self, consumed_samples: int) -> MicrobatchSampler:
        shard = self._ranks.model.shard(self._config.train.micro_batch_size)
        return MicrobatchSampler(
            self._order,
            start=consumed_samples,
            micro_batch_size=shard.samples,
            data_parallel_rank=shard.rank,
            data_parallel_size=shard.size,
        )

    def _iterator(
        self, dataset: SizedDataset | None, sampler: Sampler[list[int]], position: int
    ) -> Iterator[Any]:
        assert dataset is not None
        collate: Any = self.splits.collate
        if has_workers := self._config.train.num_workers > 0:
            dataset, collate = RejectingDataset(dataset), RejectingCollate(collate)
        loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]  # any sized, indexable object serves
            batch_sampler=sampler,
            num_workers=self._config.train.num_workers,
            # A generator of its own: the loader's draw would move the stream that a resumed run
            # continues. It seeds the workers, otherwise from each position on.
            generator=torch.Generator().manual_seed(self._config.rng.seed + position),
            pin_memory=self._ranks.device == "cuda",
            collate_fn=collate,
            worker_init_fn=prepare_worker,
        )
        iterator = self.workers.iterate(loader)
        return raised(iterator) if has_workers else iterator
