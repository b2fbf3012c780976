"""The auxiliary losses of a small GPT, written out from their definitions, and one step of ours.

The reference is one process that sees each sample alone. It takes the logits of the routers and of
the MTP layers from a model whose own auxiliary losses are off, and does the rest in plain torch.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import functional

from bridge.gpt.model_config import GPTModelConfig
from bridge.training.config import ConfigContainer, DistributedDataParallelConfig, TrainConfig
from bridge.training.gpt_step import forward_step
from gpt_models import SEQUENCE, build_chunks, microbatch, tiny_gpt
from training_runs import a_run, gpt_run, one_step
from unsharded_gradients import Gradients, unsharded_gradients

EXPERTS, TOP = 4, 2
SEED = 7

type Sample = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss that is minimized, the same under every layout.

    The coefficients are large, so that a wrong weight of an auxiliary loss is not a small error.
    """

    z: float = 0.0
    """Coefficient of the router's z-loss."""
    sequence: float = 0.0
    """Coefficient of the load-balancing loss of each sequence."""
    batch: float = 0.0
    """Coefficient of the load-balancing loss of each microbatch."""
    ahead: int = 0
    """Number of MTP layers."""
    normalization: Literal["token", "microbatch"] = "token"
    pattern: Literal[1, 2] = 2
    """1: the mean of all losses, masked or not; 2: the sum of the counted ones and their count."""
    padded: bool = False
    """Whether samples end with padding, marked by a padding mask."""
    counted: Literal["some", "none"] = "some"
    """Positions in the loss masks: fewer or more from sample to sample, or none at all."""
    micro_batch_size: int = 1
    global_batch_size: int = 8

    AHEAD_WEIGHT = 0.6

    def model(self, **layout: Any) -> GPTModelConfig:
        """Return the model, with these auxiliary losses."""
        balance = {"seq_aux_loss": self.sequence, "aux_loss": self.batch}
        balance = {name: coefficient for name, coefficient in balance.items() if coefficient}
        experts = {
            "num_moe_experts": EXPERTS,
            "moe_router_topk": TOP,
            "moe_ffn_hidden_size": 24,
            "moe_layer_freq": [0, 1, 1, 1],
            "moe_token_dispatcher_type": "alltoall",
            "moe_z_loss_coeff": self.z or None,
            "moe_router_load_balancing_type": list(balance) or "none",
            "moe_aux_loss_coeff": list(balance.values()) or 0.0,
        }
        values = experts if self.z or balance else {}
        if self.ahead:
            values |= {
                "mtp_num_layers": self.ahead,
                "mtp_loss_scaling_factor": self.AHEAD_WEIGHT,
            }
        return tiny_gpt(**values, **layout)

    def sample(self, index: int) -> Sample:
        """Return sample `index`, tensors of [1, sequence]."""
        sample = microbatch(index)
        if self.counted == "none":
            sample["loss_mask"].zero_()
        sample["loss_mask"] *= torch.arange(SEQUENCE) >= 3 * (index % 5)  # an answer
        if self.padded:
            padding = torch.arange(SEQUENCE).unsqueeze(0) >= (16, 5, 11, 3)[index % 4]
            sample["padding_mask"] = padding
            sample["loss_mask"] *= ~padding
        return sample

    def microbatch(self, number: int) -> Sample:
        """Return a microbatch of the step, tensors of [batch, sequence]."""
        first = number * self.micro_batch_size
        samples = [self.sample(first + index) for index in range(self.micro_batch_size)]
        return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}

    def forward_step(self, state: Any, data_iterator: Iterator[Any], model: Any) -> Any:
        """Run the GPT step, with a loss function of the pattern."""
        output, loss_function = forward_step(state, data_iterator, model)
        if self.pattern == 2:
            return output, loss_function
        return output, lambda out: (out.mean(), {"lm loss": out.detach().mean()})

    def run(self, directory: Path, **layout: Any) -> ConfigContainer:
        """Return a run whose optimizer changes nothing."""
        return gpt_run(
            directory,
            self.model(**layout),
            train=TrainConfig(
                train_iters=1,
                global_batch_size=self.global_batch_size,
                micro_batch_size=self.micro_batch_size,
                loss_normalization=self.normalization,
            ),
            optimizer=OptimizerConfig(lr=0.0, min_lr=0.0, clip_grad=1e9),
            # Every replica has the unsharded reduced gradients.
            ddp=DistributedDataParallelConfig(
                use_distributed_optimizer=False,
                overlap_grad_reduce=False,
                overlap_param_gather=False,
            ),
        )


@dataclass(kw_only=True)
class Found:
    """The metrics and gradients of a step."""

    metrics: dict[str, float | None]
    grad_norm: float
    gradients: Gradients = field(repr=False)

    def deviation(self, wanted: "Found") -> float:
        """Return the distance of all gradients from the wanted ones, relative to their size."""
        assert self.gradients.keys() == wanted.gradients.keys()
        names = sorted(wanted.gradients)
        found, other = (
            torch.cat([of.gradients[name].double().flatten() for name in names])
            for of in (self, wanted)
        )
        return float((found - other).norm() / other.norm())

    def deviations(self, wanted: "Found") -> list[float]:
        """Return the relative deviations of loss, auxiliary metrics, norm and gradients."""
        metrics = {
            name: abs((self.metrics[name] or 0.0) / (value or 1.0) - 1.0)
            for name, value in wanted.metrics.items()
        }
        loss = metrics.pop("lm loss")
        norm = abs(self.grad_norm / wanted.grad_norm - 1.0)
        return [loss, max(metrics.values()), norm, self.deviation(wanted)]


def step_of_ours(objective: Objective, **layout: Any) -> Found:
    """Take one step with the loop on this rank; every rank gets all gradients, unsharded."""
    with (
        tempfile.TemporaryDirectory() as directory,
        a_run(objective.run(Path(directory) / "run", **layout), objective.forward_step) as run,
    ):
        groups = run.parts.ranks.model.groups
        numbers = range(
            groups.dp.rank(),
            objective.global_batch_size // objective.micro_batch_size,
            groups.dp.size(),
        )
        batches = [objective.microbatch(number) for number in numbers]
        gradients: list[Gradients] = []
        result = one_step(
            run,
            data_iterator=[iter(batches) for _ in run.parts.model],
            reducer=run.parts.reducer,
            before_optimizer_step=lambda: gradients.append(
                unsharded_gradients(run.parts.model, groups, lambda parameter: parameter.main_grad)
            ),
        )
        metrics, norm = dict(result.metrics), float(result.grad_norm or 0.0)
        return Found(metrics=metrics, grad_norm=norm, gradients=gradients[0])


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Losses, masks and router logits of one sample."""

    losses: list[torch.Tensor]
    """Of the output layer, then of each MTP layer, [sequence]."""
    masks: list[torch.Tensor]
    """The loss mask of the targets of each of these."""
    routers: list[torch.Tensor]
    """Logits of each router at real positions, [real tokens, experts]."""


def step_by_definition(objective: Objective) -> Found:
    """Compute the objective and its gradients in this process, from the definitions."""
    plain = objective.model()
    plain.moe_z_loss_coeff = None
    plain.moe_router_load_balancing_type, plain.moe_aux_loss_coeff = "none", 0.0
    plain.mtp_loss_scaling_factor = 0.0
    (chunk,) = build_chunks(plain, SEED)
    samples = [_see(chunk, objective.sample(index)) for index in range(objective.global_batch_size)]
    total, metrics = _objective(objective, samples)
    parameters = list(chunk.parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    of_parameter = {id(p): gradient for p, gradient in zip(parameters, found, strict=True)}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Found(
        metrics=metrics,
        grad_norm=sum(float(gradient.double().square().sum()) for gradient in found) ** 0.5,
        gradients=unsharded_gradients(
            [chunk], groups, lambda parameter: of_parameter[id(parameter)]
        ),
    )


def _see(chunk: Any, sample: Sample) -> _Seen:
    routers: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []
    padding = sample.get("padding_mask", torch.zeros(1, SEQUENCE, dtype=torch.bool))
    depth = 0

    def at_router(router: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal depth
        depth += router.is_mtp_layer
        # At MTP layer d position i joins the token at i + d; past the last one nothing changes.
        real = ~_ahead(padding[0], depth, padding[0, -1])
        routers.append((inputs[0][:, 0] @ router.weight.t())[real])

    hooks = [
        module.register_forward_pre_hook(at_router)
        for name, module in chunk.named_modules()
        if name.endswith(".router")
    ]
    # The cross entropy of the model changes its logits in place.
    hooks.append(
        chunk.output_layer.register_forward_hook(
            lambda layer, inputs, output: heads.append(output[0][:, 0].clone())
        )
    )
    chunk(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
    for hook in hooks:
        hook.remove()
    labels, mask = sample["labels"][0], sample["loss_mask"][0]
    *ahead, following = heads
    return _Seen(
        losses=[
            functional.cross_entropy(logits, _ahead(labels, depth, labels[0]), reduction="none")
            for depth, logits in enumerate([following, *ahead])
        ],
        masks=[_ahead(mask, depth, torch.zeros(())) for depth in range(len(heads))],
        routers=routers,
    )


def _ahead(values: torch.Tensor, places: int, end: torch.Tensor) -> torch.Tensor:
    """Return ``values[i + places]``, and `end` where there is none."""
    return torch.cat([values[places:], end.expand(places)])


@dataclass(frozen=True, kw_only=True)
class _Term:
    """A loss: its sum over each microbatch, and the count of each sum."""

    sums: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, microbatches: list[tuple[torch.Tensor, int]]) -> "_Term":
        sums, counts = zip(*microbatches, strict=True)
        return cls(sums=torch.stack(sums), counts=torch.tensor(counts))

    def in_objective(self, tokens: int | None) -> torch.Tensor:
        """Divide by the tokens of the main loss; None: average the microbatches' means."""
        if tokens is not None:
            return self.sums.sum() / tokens
        return (self.sums / self.counts.clamp(min=1)).mean()


def _objective(
    objective: Objective, samples: list[_Seen]
) -> tuple[torch.Tensor, dict[str, float | None]]:
    size = objective.micro_batch_size
    batches = [samples[first : first + size] for first in range(0, len(samples), size)]
    tokens = None
    if objective.normalization == "token":
        counted = sum(int(sample.masks[0].sum()) for sample in samples)
        tokens = counted if objective.pattern == 2 else len(samples) * SEQUENCE
    terms: list[tuple[str, float, _Term]] = []
    if objective.pattern == 2:
        terms.append(("lm loss", 1.0, _Term.of([_head(batch, 0) for batch in batches])))
    else:
        whole = [(torch.stack([s.losses[0] for s in b]).sum(), len(b) * SEQUENCE) for b in batches]
        terms.append(("lm loss", 1.0, _Term.of(whole)))
    for depth in range(1, objective.ahead + 1):
        weight = objective.AHEAD_WEIGHT / objective.ahead
        head = _Term.of([_head(batch, depth) for batch in batches])
        terms.append((f"mtp_{depth} loss", weight, head))
    for name, coefficient, loss in (
        ("z_loss", objective.z, _z),
        ("load_balancing_loss", objective.batch, _balance_of_microbatch),
        ("seq_load_balancing_loss", objective.sequence, partial(_balance_of_sequences, tokens)),
    ):
        if coefficient:
            for router in range(len(samples[0].routers)):
                logits = [[sample.routers[router] for sample in batch] for batch in batches]
                terms.append((name, coefficient, _Term.of([loss(of) for of in logits])))
    total = torch.stack([weight * term.in_objective(tokens) for _, weight, term in terms]).sum()
    return total, {
        name: _logged([term for of, _, term in terms if of == name], tokens)
        for name in dict.fromkeys(name for name, _, _ in terms)
    }


def _logged(layers: list[_Term], tokens: int | None) -> float:
    """Return the mean of several layers over their tokens or microbatches."""
    with torch.no_grad():
        if tokens is None:
            return float(torch.stack([layer.in_objective(None) for layer in layers]).mean())
        counts = sum(int(layer.counts.sum()) for layer in layers)
        return float(torch.stack([layer.sums.sum() for layer in layers]).sum() / counts)


def _head(batch: list[_Seen], depth: int) -> tuple[torch.Tensor, int]:
    """Return the sum and the count of the losses of an MTP layer over a microbatch."""
    masks = torch.cat([sample.masks[depth] for sample in batch])
    losses = torch.cat([sample.losses[depth] for sample in batch])
    return (losses * masks).sum(), int(masks.sum())


def _z(logits: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    together = torch.cat(logits)
    return together.logsumexp(dim=-1).square().sum(), len(together)


def _balance_of_microbatch(logits: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    together = torch.cat(logits)
    return _balance(together) * len(together), len(together)


def _balance_of_sequences(
    tokens: int | None, logits: list[torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Weigh sequences by their tokens, or equally in microbatch normalization."""
    weights = [1 if tokens is None else len(of_sequence) for of_sequence in logits]
    values = [_balance(of_sequence) * w for of_sequence, w in zip(logits, weights, strict=True)]
    return torch.stack(values).sum(), sum(weights)


def _balance(logits: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e, with f_e the fraction of choices of expert e, P_e its mean probability."""
    probabilities = logits.softmax(dim=-1)
    chosen = torch.zeros_like(logits).scatter(1, probabilities.topk(TOP, dim=-1).indices, 1.0)
    share = chosen.sum(dim=0) / (TOP * len(logits))
    return EXPERTS * (share * probabilities.mean(dim=0)).sum()


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "data": (2, {}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "context": (2, {"context_parallel_size": 2}),
    "expert": (2, {"expert_model_parallel_size": 2}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "virtual": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}
"""Ranks and the model's values, by name."""
MATRIX_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = LAYOUTS | {
    "data4": (4, {}),
    "context4": (4, {"context_parallel_size": 4}),
    "tensor x context": (4, LAYOUTS["tensor"][1] | {"context_parallel_size": 2}),
    "tensor x pipeline": (4, LAYOUTS["tensor"][1] | {"pipeline_model_parallel_size": 2}),
    "tensor x expert": (4, LAYOUTS["tensor"][1] | {"expert_model_parallel_size": 2}),
    "recomputed": (
        1,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}
_MATRIX_LOSSES: dict[str, dict[str, Any]] = {
    "z": {"z": 0.5},
    "sequence": {"sequence": 1.0},
    "batch": {"batch": 1.0},
    "ahead 1": {"ahead": 1},
    "ahead 2": {"ahead": 2},
    "all": {"z": 0.5, "sequence": 1.0, "batch": 0.7, "ahead": 2},
}


def matrix() -> Iterator[tuple[str, Objective, str]]:
    """Yield name, objective and layout of each case of tools/auxiliary_losses.py."""
    for (losses, values), normalization, pattern, padded, size, layout in product(
        _MATRIX_LOSSES.items(),
        ("token", "microbatch"),
        (1, 2),
        (False, True),
        (1, 2, 4),
        MATRIX_LAYOUTS,
    ):
        has_experts = values.keys() != {"ahead"}
        needs_experts = padded or "expert_model_parallel_size" in MATRIX_LAYOUTS[layout][1]
        # So many microbatches at least, on all replicas together.
        divisor = {"virtual": 2, "data4": 4}.get(layout, 1)
        if (needs_experts and not has_experts) or (8 // size) % divisor:
            continue
        objective = Objective(
            normalization=normalization,
            pattern=pattern,
            padded=padded,
            micro_batch_size=size,
            **values,
        )
        padding = "padded" if padded else "-"
        sizes = f"pattern {pattern}  {padding:7} micro {size}"
        yield f"{losses:9} {normalization:11} {sizes}  {layout:18}", objective, layout
