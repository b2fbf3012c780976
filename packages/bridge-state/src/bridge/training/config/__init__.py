"""The configuration of a run: typed sections, one strict validator, lossless YAML.

Importing this imports megatron-core, without its noise.
"""

from bridge.training.megatron_import import quiet_import

with quiet_import():
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config.container import ConfigContainer, peft_method
from bridge.training.config.layout import Layout, layout_of
from bridge.training.config.model_identity import model_field
from bridge.training.config.overrides import YamlDocument, YamlText, apply_overrides, configure
from bridge.training.config.reference import Key, describe, reference_text
from bridge.training.config.resolution import resolve
from bridge.training.config.schema.errors import ConfigError, Problem
from bridge.training.config.sections import (
    CheckpointConfig,
    DistConfig,
    LoggerConfig,
    MixedPrecisionConfig,
    RerunConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigContainer",
    "ConfigError",
    "DistConfig",
    "DistributedDataParallelConfig",
    "Key",
    "Layout",
    "LoggerConfig",
    "MixedPrecisionConfig",
    "OptimizerConfig",
    "Problem",
    "RNGConfig",
    "RerunConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TransformerConfig",
    "ValidationConfig",
    "YamlDocument",
    "YamlText",
    "apply_overrides",
    "configure",
    "describe",
    "layout_of",
    "model_field",
    "peft_method",
    "reference_text",
    "resolve",
]
