"""The training of `own_run` on one process, written out in plain torch."""

import math
from dataclasses import dataclass, field

import torch

from bridge.training.config import ConfigContainer
from training_runs import OwnModule, Samples


@dataclass
class Reference:
    """The result of plain torch: a value for each step, and the parameters at the end."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def plain_torch(config: ConfigContainer, *, pattern: int, steps: int) -> Reference:
    """Train `own_run` on one process, with every equation written out.

    Pattern 1's objective is the mean over microbatches of their means, pattern 2's the sum of all
    valid tokens' losses over their number.
    """
    found = Reference()
    torch.manual_seed(config.rng.seed)
    module = OwnModule(config.model.width, 0.0)  # type: ignore[attr-defined]
    samples = Samples(config.dataset.train)  # type: ignore[attr-defined]
    batch = config.train.global_batch_size
    adam = _AdamW(config, module)
    for step in range(steps):
        drawn = [
            samples[drawn_sample(config, len(samples), step * batch + i)] for i in range(batch)
        ]
        x, y, mask = (torch.stack([s[key] for s in drawn]) for key in ("x", "y", "mask"))
        errors = (module(x) - y) ** 2
        # Microbatches are of one size, so the mean of their means is the mean.
        loss = errors.mean() if pattern == 1 else (errors * mask).sum() / mask.sum()
        module.zero_grad()
        loss.backward()
        rate = _rate(config, step)
        found.losses.append(loss.item())
        found.grad_norms.append(adam.step(rate))
        found.rates.append(rate)
    found.parameters = {name: value.detach() for name, value in module.named_parameters()}
    return found


def drawn_sample(config: ConfigContainer, size: int, position: int) -> int:
    """Return the index of the sample at a position of the order of a run."""
    epoch, offset = divmod(position, size)
    generator = torch.Generator().manual_seed(config.rng.seed + epoch)
    return int(torch.randperm(size, generator=generator)[offset])


def _rate(config: ConfigContainer, step: int) -> float:
    optimizer, batch = config.optimizer, config.train.global_batch_size
    assert optimizer.lr is not None
    assert optimizer.min_lr is not None
    assert config.train.train_iters is not None
    fraction = config.scheduler.lr_warmup_fraction or 0.0
    samples, whole = step * batch, config.train.train_iters * batch
    warmup = int(fraction * whole)
    if warmup and samples <= warmup:
        return optimizer.lr * samples / warmup
    share = (samples - warmup) / (whole - warmup)
    return optimizer.min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (
        optimizer.lr - optimizer.min_lr
    )


class _AdamW:
    """AdamW with clipping, in float64; weight decay for matrices only, as megatron-core has it."""

    def __init__(self, config: ConfigContainer, module: torch.nn.Module) -> None:
        self.config = config.optimizer
        self.parameters = list(module.parameters())
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = 0

    def step(self, rate: float) -> float:
        """Update the parameters; return the norm of the gradients before clipping."""
        self.steps += 1
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        scale = min(1.0, self.config.clip_grad / (norm + 1e-6))
        beta1, beta2 = self.config.adam_beta1, self.config.adam_beta2
        with torch.no_grad():
            for parameter, gradient, (first, second) in zip(
                self.parameters, gradients, self.moments, strict=True
            ):
                gradient = gradient * scale
                first.lerp_(gradient, 1 - beta1)
                second.lerp_(gradient**2, 1 - beta2)
                unbiased = first / (1 - beta1**self.steps)
                spread = (second / (1 - beta2**self.steps)).sqrt() + self.config.adam_eps
                decay = self.config.weight_decay if parameter.dim() > 1 else 0.0
                parameter.sub_(rate * (unbiased / spread + decay * parameter))
        return norm
