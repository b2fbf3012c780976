"""megatron-core's optimizer over the trained weights of a rank."""

from typing import TYPE_CHECKING, Any

from bridge.training.config import ConfigContainer
from bridge.training.contracts import ModelRanks, ScalesLearningRates
from bridge.training.model.ddp import ddp_parts

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


def build_optimizer(
    config: ConfigContainer,
    model: list[Any],
    ranks: ModelRanks,
    *,
    timers: Any = None,
) -> "MegatronOptimizer":
    """Build the optimizer over the modules that DDP wraps on this rank.

    Args:
        config: A resolved configuration.
        model: This rank's model chunks.
        ranks: The division of the model over the ranks.
        timers: megatron-core's.
    """
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    # A copy, as megatron-core keeps the object and writes to it.
    optimizer_config = OptimizerConfig(
        **{
            name: value
            for name, value in vars(config.optimizer).items()
            if name in OptimizerConfig.__dataclass_fields__
            and OptimizerConfig.__dataclass_fields__[name].init
        }
    )
    if optimizer_config.min_lr is None:
        # Else the parameter groups have None, which hides the scheduler's own lowest rate.
        optimizer_config.min_lr = 0.0
    optimizer_config.timers = timers
    optimizer: MegatronOptimizer = ranks.build_optimizer(
        optimizer_config, ddp_parts(model), _overrides(config.model, optimizer_config, model)
    )
    return optimizer


def _overrides(model_config: Any, optimizer_config: Any, model: list[Any]) -> dict[Any, Any]:
    """Return the parameter groups whose settings differ from the optimizer's config.

    They are megatron-core's own (no weight decay for biases and norms, muP's rates), and those with
    learning rates of the model section.
    """
    from megatron.core.optimizer import get_mup_config_overrides, get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
    from megatron.core.utils import get_model_config

    overrides: dict[Any, Any] = get_standard_config_overrides(optimizer_config)
    built = get_model_config(model[0])
    if built.use_mup:
        overrides |= get_mup_config_overrides(
            optimizer_config, built.mup_width_mult, optimizer_config.optimizer
        )
    if not isinstance(model_config, ScalesLearningRates):
        return overrides

    # DDP may wrap a module within the model.
    prefix = next((_name_of(part, model) for part in ddp_parts(model)), "")

    def multiplier(wrapped_name: str) -> float:
        name = wrapped_name
        while name.startswith("module."):  # the wrappers of DDP and of 16 bits
            name = name.removeprefix("module.")
        return model_config.learning_rate_multiplier(prefix + name)

    def has(factor: float) -> Any:
        return ParamWithNamePredicate(
            name=f"learning rate times {factor}", fn=lambda _, name: multiplier(name) == factor
        )

    names = {name for part in ddp_parts(model) for name, _ in part.named_parameters()}
    for factor in sorted({multiplier(name) for name in names} - {1.0}):
        overrides[ParamKey(with_name_predicate=has(factor))] = {
            "max_lr": optimizer_config.lr * factor,
            "min_lr": optimizer_config.min_lr * factor,
        }
    return overrides


def _name_of(part: Any, model: list[Any]) -> str:
    """Return the prefix of a part's parameters in the names of its chunk."""
    names = (name for chunk in model for name, module in chunk.named_modules() if module is part)
    name = next(names)
    return f"{name}." if name else ""
