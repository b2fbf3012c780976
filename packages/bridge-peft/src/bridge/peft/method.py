"""What the methods have in common: finding their layers, freezing the rest, and taking leave."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.mlp import MLP
from megatron.core.utils import unwrap_model

from bridge.peft.adapted import AdaptedLinear
from bridge.peft.linears import Linear, describe
from bridge.peft.matching import matches, named_modules, of_all_ranks, refuse_unmatched
from bridge.peft.usage_error import UsageError


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer that can be adapted."""

    name: str
    """In the whole model."""
    module: torch.nn.Module
    parent: torch.nn.Module
    linear: Linear

    @property
    def own_name(self) -> str:
        """Its name within its parent."""
        return self.name.rpartition(".")[2]

    @property
    def weight(self) -> torch.Tensor:
        """What of its weight is on this rank, [out features, in features]."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def is_gated(self) -> bool:
        """Whether its output is a gate and, behind it, the values that it is multiplied with."""
        mlp = self.parent
        return (
            isinstance(mlp, MLP) and self.own_name == "linear_fc1" and mlp.config.gated_linear_unit
        )


@dataclass(kw_only=True)
class LowRankMethod(ABC):
    """Trains low-rank updates of linear layers beside a frozen model."""

    target_modules: list[str] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    """Layers to adapt: the end of their dotted names, or a pattern with * for whole names."""
    exclude_modules: list[str] = field(default_factory=list)
    """Layers to leave out of those, in the same form."""
    dim: int = 32
    """The rank of the updates."""
    alpha: float = 32.0
    """The updates are scaled by alpha / dim."""
    dropout: float = 0.0
    """Probability of leaving an input feature out before the update is computed."""
    dtype: torch.dtype | None = None
    """Of the adapters' weights and products; that of the layer's weight if null."""

    def problems(self, config: Any) -> Iterable[str]:
        """Yield what is wrong with the fields, a line each.

        Args:
            config: The run's configuration.
        """
        if self.dim < 1:
            yield f"peft.dim={self.dim} must be positive"
        if self.alpha <= 0:
            yield f"peft.alpha={self.alpha} must be positive"
        if not 0 <= self.dropout < 1:
            yield f"peft.dropout={self.dropout} must be at least 0 and below 1"
        if not self.target_modules:
            yield "peft.target_modules=[] leaves nothing to train; name layers, or * for all"
        if self.dtype is not None and not self.dtype.is_floating_point:
            yield f"peft.dtype={self.dtype} must be of floating-point numbers"

    def attach(
        self, model_chunks: Sequence[torch.nn.Module], group: Any = None
    ) -> list[AdaptedLinear]:
        """Freeze a model and put adapters beside its layers; only they require gradients then.

        A collective where there are ranks: every pipeline stage is asked for what the patterns
        mean.

        Args:
            model_chunks: This rank's part of the model with its weights, wrapped for 16 bits or
                not, before megatron-core's DDP.
            group: The process group of all ranks of the model; the default one if None.

        Returns:
            The adapted layers of this rank.

        Raises:
            UsageError: A pattern matches nothing, no layer is left, a layer cannot be adapted, or
                one is already.
        """
        layers, passed_over = _survey(model_chunks)
        names = {name: layer for layer in layers for name in self.names_of(layer)}
        for patterns, place in (
            (self.target_modules, "peft.target_modules"),
            (self.exclude_modules, "peft.exclude_modules"),
        ):
            refuse_unmatched(place, patterns, names, passed_over, group)
        self._refuse_what_cannot(passed_over)
        meant_of = [list(filter(self._means, self.names_of(layer))) for layer in layers]
        if not any(of_all_ranks(any(meant_of), group)):
            raise UsageError(
                f"peft.exclude_modules=[{', '.join(self.exclude_modules)}] leaves nothing to train "
                f"of peft.target_modules=[{', '.join(self.target_modules)}]; exclude less"
            )
        for chunk in model_chunks:
            _freeze(chunk)
        adapted = []
        for layer, meant in zip(layers, meant_of, strict=True):
            if meant:
                adapter = self.adapter_for(layer, meant)
                wrapper = AdaptedLinear(layer.name, layer.module, layer.linear, adapter)
                _replace(layer.parent, layer.module, wrapper)
                adapted.append(wrapper)
        return adapted

    def merge(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """Fold the adapters into the weights and put the plain layers back.

        Args:
            model_chunks: What `attach` was given.
        """
        for chunk in model_chunks:
            for adapted in adapted_layers(chunk):
                parent = _parent_of(chunk, adapted)
                _replace(parent, adapted, adapted.merge())

    def adapter_options(self) -> dict[str, Any]:
        """Return what all adapters of the method are made with."""
        return {
            "dim": self.dim,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }

    def names_of(self, layer: Layer) -> list[str]:
        """Return the names that patterns may mean a layer by."""
        return [layer.name]

    @abstractmethod
    def adapter_for(self, layer: Layer, meant: Sequence[str]) -> torch.nn.Module:
        """Make the adapter of a layer.

        Args:
            layer: The layer.
            meant: Those of its `names_of` that the patterns mean.
        """

    def _means(self, name: str) -> bool:
        return any(matches(name, pattern) for pattern in self.target_modules) and not any(
            matches(name, pattern) for pattern in self.exclude_modules
        )

    def _refuse_what_cannot(self, passed_over: dict[str, str]) -> None:
        lines = [
            f"peft.target_modules: {name} cannot be adapted: {reason}; or name it in "
            "peft.exclude_modules"
            for name, reason in passed_over.items()
            if reason != _NO_LINEAR and self._means(name) and not name.endswith("output_layer")
        ]
        if lines:
            raise UsageError("\n".join(lines))


_NO_LINEAR = "it is no linear layer"


def adapted_layers(chunk: torch.nn.Module) -> Iterator[AdaptedLinear]:
    """Yield the adapted layers of a model chunk."""
    found = [module for module in chunk.modules() if isinstance(module, AdaptedLinear)]
    yield from found


def _survey(
    model_chunks: Sequence[torch.nn.Module],
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers that can be adapted; and by name why others cannot."""
    layers: list[Layer] = []
    passed_over: dict[str, str] = {}
    for chunk in model_chunks:
        root = unwrap_model(chunk)
        for name, local, module in named_modules(chunk):
            if isinstance(module, AdaptedLinear):
                raise UsageError(f"{name}: has an adapter already; merge it before another comes")
            parent = root.get_submodule(local.rpartition(".")[0])
            linear = describe(module)
            if isinstance(linear, Linear) and _is_bypassed(parent):
                linear = (
                    "a fused MLP does not call it; set model.use_transformer_engine_op_fuser=false"
                )
            if isinstance(linear, Linear):
                layers.append(Layer(name=name, module=module, parent=parent, linear=linear))
            else:
                passed_over[name] = linear or _NO_LINEAR
    return layers, passed_over


def _is_bypassed(parent: torch.nn.Module) -> bool:
    if not HAVE_TE:
        return False
    from megatron.core.extensions import transformer_engine as engine

    fused = getattr(engine, "TEFusedMLP", None)
    return fused is not None and isinstance(parent, fused)


def _freeze(chunk: torch.nn.Module) -> None:
    for parameter in chunk.parameters():
        parameter.requires_grad_(False)
    for module in chunk.modules():
        if hasattr(module, "expert_bias"):
            # megatron-core moves it without gradients, to balance the experts.
            module.frozen_expert_bias = True  # type: ignore[assignment]


def _replace(parent: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> None:
    for name, child in parent.named_children():
        if child is old:
            setattr(parent, name, new)


def _parent_of(chunk: torch.nn.Module, module: torch.nn.Module) -> torch.nn.Module:
    return next(
        candidate
        for candidate in chunk.modules()
        if any(child is module for child in candidate.children())
    )
