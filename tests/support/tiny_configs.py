"""Small model and dataset sections for tests of the configuration. They build nothing."""

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, override

import torch

from bridge.training.config import ConfigContainer, TrainConfig, TransformerConfig
from bridge.training.contracts import DataRequest, DataSplits


@dataclass(kw_only=True)
class TinyModel:
    width: int = 4

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        return torch.nn.Linear(self.width, self.width)


@dataclass(kw_only=True)
class TinyTransformer(TransformerConfig):
    """A model section that defers megatron-core's own checks, as such sections should."""

    num_layers: int = 4
    hidden_size: int = 8
    num_attention_heads: int = 4
    seq_length: int = 16

    @override
    def __post_init__(self) -> None:
        pass

    def finalized(self) -> TransformerConfig:
        final = copy.deepcopy(self)
        TransformerConfig.__post_init__(final)
        return final

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        raise NotImplementedError


@dataclass(kw_only=True)
class OpenTransformer(TinyTransformer):
    """A model section with fields that depend on the device if the user does not set them."""

    layers: Literal["auto", "fast", "local"] = "auto"
    fused: bool | None = None

    def open_fields(
        self, config: ConfigContainer, *, device: Literal["cuda", "cpu"]
    ) -> dict[str, Any]:
        layers = self.layers
        if layers == "auto":
            layers = "fast" if device == "cuda" else "local"
        return {"layers": layers, "fused": layers == "fast"}


@dataclass(kw_only=True)
class EagerTransformer(TransformerConfig):
    """A user's model section that megatron-core completes at once."""

    num_layers: int = 2
    hidden_size: int = 8
    num_attention_heads: int = 2

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> torch.nn.Module:
        raise NotImplementedError


@dataclass(kw_only=True)
class Augmentation:
    flip: bool = False
    scales: tuple[float, float] = (0.5, 2.0)


@dataclass(kw_only=True)
class TinyData:
    path: str | Path | None = None
    mixture: list[str] = field(default_factory=list)
    augmentation: Augmentation = field(default_factory=Augmentation)
    crop: Literal["center", "random"] = "center"
    size: int = 64

    def problems(self, config: ConfigContainer) -> Iterable[str]:
        if self.size < config.train.global_batch_size:
            yield f"dataset.size={self.size} is less than one global batch"

    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(train=None)


@dataclass(kw_only=True, frozen=True)
class FrozenData:
    size: int

    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(train=None)


class PlainData:
    """Not a dataclass: text can neither change nor rebuild it."""

    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(train=None)


def tiny_config(**sections: Any) -> ConfigContainer:
    """Return a valid configuration; `sections` replace its own."""
    defaults: dict[str, Any] = {
        "model": TinyTransformer(),
        "dataset": TinyData(),
        "train": TrainConfig(train_iters=8, global_batch_size=8, micro_batch_size=2),
    }
    return ConfigContainer(**{**defaults, **sections})


def with_values(config: ConfigContainer, **values: Any) -> ConfigContainer:
    """Return a copy with fields set from Python: ``train__train_iters=5``."""
    changed = config.copy()
    for path, value in values.items():
        section, name = path.split("__")
        target = getattr(changed, section)
        if dataclasses.is_dataclass(target):
            setattr(target, name, value)
    return changed
