"""The base class of all methods: attaches adapters to a model, freezes the rest, and merges."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from bridge.peft.adapters.adapter import Adapter
from bridge.peft.adapters.wrapper import AdaptedLinear
from bridge.peft.layers.candidates import NOT_LINEAR, Layer, find_layers
from bridge.peft.layers.patterns import gather_from_ranks, matches, reject_unmatched
from bridge.peft.usage_error import UsageError


@dataclass(kw_only=True)
class LowRankMethod:
    """A method that trains low-rank updates of linear layers on top of a frozen model."""

    adapter_class: ClassVar[type[Adapter]]
    """The adapter of a layer that is no fused one."""

    target_modules: list[str] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    """Layers to adapt: the end of their dotted names, or a pattern with * for whole names."""
    exclude_modules: list[str] = field(default_factory=list)
    """Layers to exclude from those, in the same form."""
    dim: int = 32
    """The rank of the updates."""
    alpha: float = 32.0
    """The updates are scaled by alpha / dim."""
    dropout: float = 0.0
    """Probability of zeroing an input feature before the update is computed."""
    dtype: torch.dtype | None = None
    """Dtype of the adapters' weights and products; that of the layer's weight if null."""

    def problems(self, config: Any) -> Iterable[str]:
        """Yield the mistakes in the fields, a line each.

        Args:
            config: The run's configuration.
        """
        if self.dim < 1:
            yield f"peft.dim={self.dim}: must be positive; raise it"
        if self.alpha <= 0:
            yield f"peft.alpha={self.alpha}: must be positive; raise it"
        if not 0 <= self.dropout < 1:
            yield f"peft.dropout={self.dropout}: must be at least 0 and below 1; change it"
        if not self.target_modules:
            yield "peft.target_modules=[]: leaves nothing to train; name layers, or * for all"
        if self.dtype is not None and not self.dtype.is_floating_point:
            yield f"peft.dtype={self.dtype}: must be a floating-point type; change it"

    def attach(
        self, model_chunks: Sequence[torch.nn.Module], group: Any = None
    ) -> list[AdaptedLinear]:
        """Freeze a model and add adapters to its layers; only they require gradients then.

        A collective where there are ranks: the patterns are matched on every pipeline stage.

        Args:
            model_chunks: This rank's part of the model with its weights, perhaps in
                megatron-core's Float16Module, and not yet in its DDP.
            group: The process group of all ranks of the model; the default one if None.

        Returns:
            The adapted layers of this rank.

        Raises:
            UsageError: A pattern matches nothing, no layer is left, a layer cannot be adapted, or
                one has an adapter already.
        """
        _reject_adapted(model_chunks)
        layers, unadaptable = find_layers(model_chunks)
        names = {name for layer in layers for name in self.names_of(layer)}
        for patterns, path in (
            (self.target_modules, "peft.target_modules"),
            (self.exclude_modules, "peft.exclude_modules"),
        ):
            reject_unmatched(path, patterns, names, unadaptable, group)
        self._reject_unadaptable(unadaptable)
        selections = [list(filter(self._selects, self.names_of(layer))) for layer in layers]
        if not any(gather_from_ranks(any(selections), group)):
            raise UsageError(
                f"peft.exclude_modules=[{', '.join(self.exclude_modules)}]: leaves nothing to "
                f"train of peft.target_modules=[{', '.join(self.target_modules)}]; exclude less"
            )
        for chunk in model_chunks:
            _freeze(chunk)
        adapted = []
        for layer, selected in zip(layers, selections, strict=True):
            if selected:
                adapter = self.build_adapter(layer, selected)
                wrapper = AdaptedLinear(layer.name, layer.module, layer.layout, adapter)
                layer.parent.add_module(layer.own_name, wrapper)
                adapted.append(wrapper)
        return adapted

    def merge(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """Merge the adapters into the weights, and restore the plain layers.

        Args:
            model_chunks: The chunks that `attach` was given.
        """
        for chunk in model_chunks:
            for path, module in list(chunk.named_modules()):
                if isinstance(module, AdaptedLinear):
                    chunk.set_submodule(path, module.merge())

    def adapter_options(self) -> dict[str, Any]:
        """Return the arguments that all adapters of the method share."""
        return {
            "dim": self.dim,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }

    def names_of(self, layer: Layer) -> list[str]:
        """Return the names by which patterns may select a layer."""
        return [layer.name]

    def build_adapter(self, layer: Layer, selected: Sequence[str]) -> Adapter:
        """Build the adapter of a layer.

        Args:
            layer: The layer.
            selected: Those of its `names_of` that the patterns select.
        """
        return self.adapter_class(
            layer.weight, layer.layout, is_gated=layer.is_gated, **self.adapter_options()
        )

    def _selects(self, name: str) -> bool:
        return any(matches(name, pattern) for pattern in self.target_modules) and not any(
            matches(name, pattern) for pattern in self.exclude_modules
        )

    def _reject_unadaptable(self, unadaptable: dict[str, str]) -> None:
        lines = [
            f"peft.target_modules: {name} cannot be adapted: {reason}; or name it in "
            "peft.exclude_modules"
            for name, reason in unadaptable.items()
            if reason != NOT_LINEAR and self._selects(name) and not name.endswith("output_layer")
        ]
        if lines:
            raise UsageError("\n".join(lines))


def _reject_adapted(model_chunks: Sequence[torch.nn.Module]) -> None:
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, AdaptedLinear):
                raise UsageError(
                    f"{module.name}: has an adapter already; merge it before you attach another"
                )


def _freeze(chunk: torch.nn.Module) -> None:
    for parameter in chunk.parameters():
        parameter.requires_grad_(False)
    for module in chunk.modules():
        if hasattr(module, "expert_bias"):
            # megatron-core moves it without gradients, to balance the experts.
            module.frozen_expert_bias = True  # type: ignore[assignment]
