"""The contracts between a run and the pieces that it does not own: a model, its data, a recipe.

The loop knows no model family. Whatever satisfies these Protocols can be trained, so a module, a
dataset and a forward step of your own make a run.
"""

from bridge.training.contracts.data import (
    TOKENS,
    DataRequest,
    DatasetConfig,
    DataShard,
    DataSplits,
    SizedDataset,
    named_sets,
    wrong_set_name,
)
from bridge.training.contracts.export import ExportedWeight, Exporter, ExportRequest, NamesWeights
from bridge.training.contracts.model import (
    ArrangesRanks,
    ChecksItself,
    DerivesFields,
    DrawsLayout,
    LeavesFieldsOpen,
    ModelConfig,
    ScalesLearningRates,
)
from bridge.training.contracts.peft import AdaptedLayer, LowRankUpdate, PEFTMethod
from bridge.training.contracts.ranks import ModelRanks, PlacesModules
from bridge.training.contracts.recipe import Recipe

__all__ = [
    "TOKENS",
    "AdaptedLayer",
    "ArrangesRanks",
    "ChecksItself",
    "DataRequest",
    "DataShard",
    "DataSplits",
    "DatasetConfig",
    "DerivesFields",
    "DrawsLayout",
    "ExportRequest",
    "ExportedWeight",
    "Exporter",
    "LeavesFieldsOpen",
    "LowRankUpdate",
    "ModelConfig",
    "ModelRanks",
    "NamesWeights",
    "PEFTMethod",
    "PlacesModules",
    "Recipe",
    "ScalesLearningRates",
    "SizedDataset",
    "named_sets",
    "wrong_set_name",
]
