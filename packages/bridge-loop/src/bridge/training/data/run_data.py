"""The data of a run: one iterator over microbatches for each model chunk of a rank."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from bridge.training.config import ConfigContainer
from bridge.training.contracts import DataRequest, DataSplits, SizedDataset, named_sets
from bridge.training.data.evaluation_plan import plan_of_run
from bridge.training.data.loader_errors import RejectingCollate, RejectingDataset, raise_rejections
from bridge.training.data.loader_workers import LoaderWorkers, prepare_worker
from bridge.training.data.run_length import last_step, samples_to_draw, schedule_samples
from bridge.training.data.sample_order import EvaluationSampler, MicrobatchSampler, SampleOrder
from bridge.training.data.splits import cut_to_the_smallest
from bridge.training.ranks.collectives import sum_of_all
from bridge.training.ranks.groups import Ranks
from bridge.training.state import TrainState
from bridge.training.usage_error import UsageError


def data_request(
    config: ConfigContainer,
    modules: frozenset[str] | None = None,
    done: TrainState | None = None,
) -> DataRequest:
    """Return the amount of data that a run draws, from its resolved configuration.

    Args:
        config: The run.
        modules: The modules whose inputs this rank reads; None for all.
        done: The counters of the run; None for a new run.

    Raises:
        UsageError: The run has done more than the configuration asks for.
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


class RunData:
    """The data of one run, as this rank draws it; building it is a collective over all ranks.

    Args:
        splits: The data that this rank's dataset built.
        config: The resolved configuration.
        ranks: The ranks of the run.
        done: The counters of the run; None for a new run.
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
        self._counts = dict.fromkeys(splits.items, 0)
        self._check_sets()

    @property
    def fingerprint(self) -> str:
        """The name of the order of the training samples; saved with checkpoints."""
        return self.splits.fingerprint or self._order.fingerprint

    def _check_sets(self) -> None:
        """Reject a set that cannot be evaluated now, not when training is over."""
        for split in ("validation", "test"):
            for name, dataset in self.sets(split).items():
                if len(dataset) == 0 and self._config.validation.eval_iters != 0:
                    raise UsageError(
                        f"{name} data: it has no samples; enlarge it or leave it out, or turn "
                        "evaluation off with validation.eval_iters=0"
                    )

    def training(self, consumed_samples: int) -> list[Iterator[Any]]:
        """Return one endless iterator a model chunk over this rank's training microbatches."""
        assert self.splits.train is not None
        shard = self._ranks.model.shard(self._config.train.micro_batch_size)
        sampler = MicrobatchSampler(self._order, shard, start=consumed_samples)
        iterators = [
            self._iterator(self.splits.train, sampler, consumed_samples)
            for _ in range(self._ranks.layout.virtual_pipeline or 1)
        ]
        if self._counts and self._is_counting_rank():
            iterators[-1] = self._count(iterators[-1])
        return iterators

    def take_counts(self) -> dict[str, int]:
        """Return the counts of `DataSplits.items` since the last call, over all ranks.

        A collective of the hosts, if the data counts anything.
        """
        if not self._counts:
            return {}
        counts = sum_of_all(list(self._counts.values()), self._ranks.control_group)
        self._counts = dict.fromkeys(self._counts, 0)
        return dict(zip(self._counts, counts, strict=True))

    def _is_counting_rank(self) -> bool:
        """Whether this rank counts; it is one of several that read the same samples."""
        ranks = self._ranks.model
        return ranks.reports_losses and ranks.groups.cp.rank() == 0

    def _count(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Yield the microbatches, and count their items."""
        for microbatch in iterator:
            for name, count in self.splits.items.items():
                self._counts[name] += count(microbatch)
            yield microbatch

    def sets(self, split: str) -> dict[str, SizedDataset]:
        """Return the sets of a split by the names of their results (`named_sets`)."""
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
        """Return the number of samples that one evaluation of a set draws, over all ranks."""
        eval_iters, size = self._config.validation.eval_iters, len(dataset)
        if eval_iters is None:
            return size
        return min(size, eval_iters * self._config.train.global_batch_size)

    @property
    def smallest_microbatch(self) -> int:
        """Samples of which a replica's microbatch must be a multiple, 1 in most layouts."""
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

    def _iterator(
        self, dataset: SizedDataset, sampler: Sampler[list[int]], position: int
    ) -> Iterator[Any]:
        collate: Any = self.splits.collate
        if has_workers := self._config.train.num_workers > 0:
            dataset, collate = RejectingDataset(dataset), RejectingCollate(collate)
        loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]  # any sized, indexable object serves
            batch_sampler=sampler,
            num_workers=self._config.train.num_workers,
            # A generator of its own, as the loader's draw would move the stream that a resumed run
            # continues. It seeds the workers, with another seed from each position on.
            generator=torch.Generator().manual_seed(self._config.rng.seed + position),
            pin_memory=self._ranks.device == "cuda",
            collate_fn=collate,
            worker_init_fn=prepare_worker,
        )
        iterator = self.workers.iterate(loader)
        return raise_rejections(iterator) if has_workers else iterator
