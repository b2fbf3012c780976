"""The container of a run's configuration: all sections, to and from plain values."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from bridge.training.config.provenance import DERIVED, Provenance
from bridge.training.config.schema.convert import build_dataclass, convert
from bridge.training.config.schema.errors import ConfigError, ConversionError, FieldProblems
from bridge.training.config.schema.import_limits import limit_imports
from bridge.training.config.schema.peft_methods import METHOD
from bridge.training.config.schema.to_plain import to_plain
from bridge.training.config.schema.yaml12 import dump_yaml, load_yaml
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
from bridge.training.contracts import DatasetConfig, ModelConfig, PEFTMethod


def _default_optimizer() -> OptimizerConfig:
    return OptimizerConfig(lr=3e-4, min_lr=3e-5, weight_decay=0.1, adam_beta2=0.95)


def _default_ddp() -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )


@dataclass(kw_only=True)
class ConfigContainer:
    """The configuration of a run.

    Attributes may be set freely; `resolve` finds the problems in them. `optimizer` and `ddp`
    are megatron-core's own dataclasses, and a model section may be a `TransformerConfig`.
    """

    recipe: str | None = None
    """The recipe that the configuration started from."""
    command: Literal["pretrain", "finetune"] | None = None
    """The entry point that made the run, which alone continues it; None before there is one."""
    model: ModelConfig
    """The model that is trained, and its parallel layout."""
    peft: PEFTMethod | None = None
    """The adapters that are trained on top of the frozen model, found by ``peft.method``; None
    trains the model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The length of the run and its batches."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The times and the size of evaluations."""
    optimizer: OptimizerConfig = field(default_factory=_default_optimizer)
    """megatron-core's optimizer and its peak learning rate."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """The learning rate over the run."""
    ddp: DistributedDataParallelConfig = field(default_factory=_default_ddp)
    """megatron-core's data-parallel wrapper."""
    dataset: DatasetConfig
    """The data."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer, for datasets of text."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """The metrics that are logged, when and where."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The run's directory, and what it saves and loads."""
    dist: DistConfig = field(default_factory=DistConfig)
    """Devices and process groups."""
    rng: RNGConfig = field(default_factory=RNGConfig)
    """Random numbers."""
    rerun: RerunConfig = field(default_factory=RerunConfig)
    """Repetition of steps to find faulty hardware."""
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
    """The precision of the model's computations."""

    def __post_init__(self) -> None:
        """Start with no record of where values came from."""
        self.provenance = Provenance()

    def to_dict(self, *, brief: bool = False) -> dict[str, Any]:
        """Return plain values (YAML's types) from which `from_dict` makes an equal object.

        Fields that resolution filled in are listed in ``derived``: they are filled in anew when
        the text is used where they would be otherwise, such as on another device.

        Args:
            brief: Leave out the fields of megatron-core's dataclasses that hold their default.
                For reading: a newer megatron-core may have other defaults.

        Raises:
            ConfigError: Values have no name to be written by, such as a lambda.
        """
        try:
            plain: dict[str, Any] = to_plain(self, type(self), "", brief=brief)
        except FieldProblems as error:
            raise ConfigError(error.problems) from error
        if derived := self.provenance.derived_paths(self):
            plain[DERIVED] = derived
        return plain

    def to_yaml(self, *, brief: bool = False) -> str:
        """Return `to_dict` as YAML text."""
        return dump_yaml(self.to_dict(brief=brief))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Build the configuration that `to_dict` wrote.

        Sections that are Protocols (model, dataset) name their class in ``_target_``: one of torch,
        megatron-core, bridge or a package with entry points of bridge, or of a module of the
        program's own that is imported already.

        Raises:
            ConfigError: With every unknown key, wrong type and missing value, and every name that
                is not imported for a file.
        """
        try:
            sections = {key: value for key, value in plain.items() if key != DERIVED}
            with limit_imports():
                config: Self = build_dataclass(cls, sections, "")
        except FieldProblems as error:
            raise ConfigError(error.problems) from error
        if problems := config.provenance.record_derived(config, plain, is_complete=True):
            raise ConfigError(problems)
        return config

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Build the configuration that `to_yaml` wrote.

        Raises:
            ConfigError: As `from_dict`, or the text is not YAML.
        """
        try:
            plain = load_yaml(text)
        except ConversionError as error:
            raise ConfigError([f"the text {error}"]) from error
        if not isinstance(plain, Mapping):
            raise ConfigError([f"expected sections, got {plain!r}"])
        return cls.from_dict(plain)

    def copy(self) -> Self:
        """Return a deep copy."""
        return copy.deepcopy(self)


def peft_method(method: str, **fields: Any) -> PEFTMethod:
    """Return a section ``peft`` of the dataclass that an installed package offers.

    Args:
        method: The method's name, such as "lora".
        fields: The dataclass's own.

    Raises:
        ConfigError: There is no such method, or no package that brings it; or the fields are not
            its.
    """
    try:
        section: PEFTMethod = convert({METHOD: method, **fields}, PEFTMethod, "peft")
    except FieldProblems as error:
        raise ConfigError(error.problems) from error
    except ConversionError as error:
        raise ConfigError([f"peft.{error}"]) from error
    return section


SECTIONS = tuple(
    f.name for f in dataclasses.fields(ConfigContainer) if f.name not in ("recipe", "command")
)
