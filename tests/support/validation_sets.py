"""Validation sets with names, and their losses computed by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.evaluate import EvaluationResult, evaluate
from bridge.training.run import Run
from training_runs import OwnModule, Samples

FIRST = {"wiki": 1000, "code": 3000, "test": 5000}
"""Index of the first sample of a set; their numbers of valid tokens follow from it."""


@dataclass(kw_only=True)
class NamedData:
    """Data with several validation and test sets by name."""

    train: int = 24
    validation: dict[str, int] = field(default_factory=lambda: {"wiki": 24, "code": 16})
    test: dict[str, int] = field(default_factory=dict)

    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(
            train=Samples(self.train),
            validation={
                name: Samples(size, FIRST.get(name, 7000)) for name, size in self.validation.items()
            },
            test={name: Samples(size, FIRST["test"]) for name, size in self.test.items()},
        )


@dataclass(kw_only=True)
class SizesOfRanks:
    """Data whose sizes depend on the rank: entry r is for rank r."""

    train: Sequence[int] = (24, 24)
    validation: Sequence[int] = (8, 8)
    code: Sequence[int] = ()

    def build(self, request: DataRequest) -> DataSplits:
        rank = dist.get_rank()
        one = Samples(self.validation[rank], FIRST["wiki"])
        named = {"wiki": one, "code": Samples(self.code[rank], FIRST["code"])} if self.code else one
        return DataSplits(train=Samples(self.train[rank]), validation=named)


def evaluated(
    run: Run, samples: int | None = None, *, name: str = "validation", **arguments: Any
) -> EvaluationResult:
    """Evaluate a set as the run would, or the first `samples` of it."""
    parts = run.parts
    iterators, drawn = parts.data.evaluation(parts.data.set_named(name), samples)
    values: dict[str, Any] = {
        "num_samples": drawn,
        "pg_collection": parts.ranks.pg_collection,
        "reducer": parts.reducer,
    }
    return evaluate(parts.forward_step, iterators, parts.model, parts.state, **(values | arguments))


def error_of(seed: int, first: int, samples: int, *, valid_only: bool = True) -> float:
    """Return the mean squared error per token of the untrained `OwnModel`, in float64.

    The mean is over the valid tokens of `samples` samples, starting with sample `first`.
    """
    torch.manual_seed(seed)
    module = OwnModule(6, 0.0).double()
    data = Samples(samples, first)
    drawn = [data[index] for index in range(samples)]
    x, y, mask = (torch.stack([s[key] for s in drawn]).double() for key in ("x", "y", "mask"))
    if not valid_only:
        mask = torch.ones_like(mask)
    return float((((module(x) - y) ** 2) * mask).sum().detach() / mask.sum())


def tokens_of(first: int, samples: int) -> int:
    """Return the number of valid tokens of the samples."""
    data = Samples(samples, first)
    return int(sum(data[index]["mask"].sum() for index in range(samples)))
