"""Which samples a rank sees, and when.

The order of the samples is a function of the seed and the dataset alone, and the position in it is
the number of samples consumed: that one number resumes a run exactly, at no cost. A global batch is
cut into microbatches of consecutive samples, and microbatch k goes to data-parallel rank k mod D.
So every layout trains on the same samples at the same step, in the same microbatches.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from bridge.training.config import ConfigContainer, TrainConfig
from bridge.training.contracts import DataSplits, SizedDataset
from bridge.training.distributed import Ranks


def as_splits(built: DataSplits | Sequence[SizedDataset | None]) -> DataSplits:
    """Return what ``dataset.build`` gave as `DataSplits`; a sequence is train, validation, test."""
    if isinstance(built, DataSplits):
        return built
    if not isinstance(built, Sequence) or not 1 <= len(built) <= 3:
        raise ValueError(
            "dataset.build: expected DataSplits or a sequence of train, validation and test data, "
            f"got {type(built).__name__}"
        )
    train, validation, test = [*built, None, None][:3]
    return DataSplits(train=train, validation=validation, test=test)


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
    """Yields the indices of this rank's microbatches, from a position on.

    Args:
        order: The order of the samples.
        start: Samples consumed before.
        stop: Position to stop at; None goes on for ever.
        micro_batch_size: Samples of a microbatch.
        data_parallel_rank: This rank's place among the data-parallel ranks.
        data_parallel_size: Number of data-parallel ranks.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        start: int,
        stop: int | None,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self._order = order
        self._start = start
        self._stop = stop
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size

    def __iter__(self) -> Iterator[list[int]]:
        stride = self._micro_batch_size * self._size
        for block in itertools.count(self._start, stride):
            if self._stop is not None and block + stride > self._stop:
                return
            first = block + self._rank * self._micro_batch_size
            yield [self._order[first + i] for i in range(self._micro_batch_size)]


def evaluation_samples(
    size: int, *, global_batch_size: int, replica_batch_size: int, eval_iters: int | None
) -> int:
    """Return how many samples of a set one evaluation draws: the same under every layout.

    Whole global batches are taken. Only a set smaller than one global batch is cut to a multiple of
    `replica_batch_size` (micro batch size x data-parallel size), since every rank must take part.

    Raises:
        ValueError: The set is smaller than that.
    """
    wanted = size if eval_iters is None else min(size, eval_iters * global_batch_size)
    unit = global_batch_size if wanted >= global_batch_size else replica_batch_size
    samples = wanted // unit * unit
    if samples == 0 and eval_iters != 0:
        raise ValueError(
            f"validation data: {size} samples are fewer than the {replica_batch_size} of one "
            "microbatch on every data-parallel rank; lower train.micro_batch_size, enlarge the "
            "validation split, or turn evaluation off with validation.eval_iters=0"
        )
    return samples


class RunData:
    """The data of one run, as this rank draws it.

    Args:
        splits: What the dataset built.
        config: The resolved configuration.
        ranks: The process groups.
    """

    def __init__(self, splits: DataSplits, config: ConfigContainer, ranks: Ranks) -> None:
        self.splits = splits
        self._config = config
        self._ranks = ranks
        if splits.train is None or len(splits.train) == 0:
            raise ValueError(
                "dataset: there is no training data; give the training split at least "
                f"{config.train.global_batch_size} samples (train.global_batch_size)"
            )
        self._order = SampleOrder(len(splits.train), shuffle=splits.shuffle, seed=config.rng.seed)
        self.train_iters = self._resolve_train_iters(len(splits.train))
        # A set that cannot be evaluated is found now, not when training is over.
        for dataset in (splits.validation, splits.test):
            if dataset is not None and len(dataset):
                self.evaluation_samples(dataset)

    @property
    def fingerprint(self) -> str:
        """Names the order of the training samples; saved with checkpoints."""
        return self.splits.fingerprint or self._order.fingerprint

    def training(self, consumed_samples: int) -> list[Iterator[Any]]:
        """Return one endless iterator a model chunk over this rank's training microbatches."""
        return [
            self._iterator(
                self.splits.train, self._order, consumed_samples, None, self._config.train
            )
            for _ in range(self._ranks.layout.virtual_pipeline or 1)
        ]

    def evaluation_samples(self, dataset: SizedDataset) -> int:
        """Return how many samples one evaluation of a set draws, over all ranks."""
        train = self._config.train
        return evaluation_samples(
            len(dataset),
            global_batch_size=train.global_batch_size,
            replica_batch_size=self._samples_that_fill_the_ranks(),
            eval_iters=self._config.validation.eval_iters,
        )

    def _samples_that_fill_the_ranks(self) -> int:
        """Samples of which every rank has work: an interleaved pipeline takes whole groups."""
        train, layout = self._config.train, self._ranks.layout
        microbatches = 1
        if layout.virtual_pipeline is not None:
            group = getattr(self._config.model, "microbatch_group_size_per_vp_stage", None)
            microbatches = group or layout.pipeline
        return train.micro_batch_size * layout.data * microbatches

    def evaluation(self, dataset: SizedDataset) -> tuple[list[Iterator[Any]], int]:
        """Return one iterator a model chunk over an evaluation's microbatches, and its samples."""
        train, samples = self._config.train, self.evaluation_samples(dataset)
        order = SampleOrder(len(dataset), shuffle=False, seed=0)
        iterators = [
            self._iterator(dataset, order, 0, samples, train)
            for _ in range(self._ranks.layout.virtual_pipeline or 1)
        ]
        return iterators, samples

    def _iterator(
        self,
        dataset: SizedDataset | None,
        order: SampleOrder,
        start: int,
        stop: int | None,
        train: TrainConfig,
    ) -> Iterator[Any]:
        assert dataset is not None
        loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]  # any sized, indexable object serves
            batch_sampler=MicrobatchSampler(
                order,
                start=start,
                stop=stop,
                micro_batch_size=train.micro_batch_size,
                data_parallel_rank=self._ranks.pg_collection.dp.rank(),
                data_parallel_size=self._ranks.layout.data,
            ),
            num_workers=train.num_workers,
            # A generator of its own: the loader's draw would move the stream that a resumed run
            # continues. It seeds the workers, otherwise from each position on.
            generator=torch.Generator().manual_seed(self._config.rng.seed + start),
            pin_memory=self._ranks.device == "cuda",
            collate_fn=self.splits.collate,
        )
        return iter(loader)

    def _resolve_train_iters(self, size: int) -> int:
        train = self._config.train
        if train.train_iters is not None:
            return train.train_iters
        if train.train_samples is not None:
            return train.train_samples // train.global_batch_size
        assert train.epochs is not None
        iters = train.epochs * size // train.global_batch_size
        if iters == 0:
            raise ValueError(
                f"train.epochs: {train.epochs} passes over {size} samples are less than one step "
                f"of train.global_batch_size={train.global_batch_size}; lower the batch size"
            )
        return iters
