"""Users' mistakes that a data loading process rejects, raised in the training process.

torch turns an exception of a worker into another one, with the worker's traceback in its message.
The message of a `UsageError` is one line. So it is sent in place of the microbatch, and raised
where the microbatch is read.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import default_collate

from bridge.training.contracts import SizedDataset
from bridge.training.usage_error import is_usage_error


@dataclass(frozen=True)
class Rejection:
    """The exception of the dataset or its collate function, in place of a microbatch."""

    error: Exception


class RejectingDataset:
    """A dataset that returns its rejections in place of samples, in a worker."""

    def __init__(self, dataset: SizedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> Any:
        return self._dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """Return the samples of a microbatch; torch's loaders call this method."""
        several = getattr(self._dataset, "__getitems__", None)
        try:
            return several(indices) if several else [self._dataset[index] for index in indices]
        except Exception as error:
            return _rejection(error)


@dataclass(frozen=True)
class RejectingCollate:
    """A collate function that returns its rejections, and those of the dataset."""

    collate: Callable[[Sequence[Any]], Any] | None
    """torch's default_collate if None."""

    def __call__(self, samples: Any) -> Any:
        """Make a microbatch."""
        if isinstance(samples, Rejection):
            return samples
        try:
            return (self.collate or default_collate)(samples)
        except Exception as error:
            return _rejection(error)


def raise_rejections(microbatches: Iterator[Any]) -> Iterator[Any]:
    """Yield microbatches, and raise the exception of a rejection."""
    for microbatch in microbatches:
        if isinstance(microbatch, Rejection):
            raise microbatch.error
        yield microbatch


def _rejection(error: Exception) -> Rejection:
    """Return a user's mistake as a rejection; raise any other exception again."""
    if not is_usage_error(error):
        raise error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        raise error from None
    return Rejection(error)
