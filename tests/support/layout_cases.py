"""A matrix of models, layouts and objectives, and the combinations that make sense.

Everything is as small as it may be: collectives between processes that share two cores take
milliseconds, and a step makes dozens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, override

from torch.nn import functional

from bridge.gpt.model_config import GPTModelConfig
from gpt_models import tiny_gpt

STEPS = 20
GLOBAL_BATCH = 8
MICRO_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Model:
    """A GPT: four layers of width 32, gated, untied, with 2 query groups, unless changed."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    precision: Literal["fp32", "bf16"] = "fp32"
    everywhere: bool = False
    """Whether it is tried in every layout and for every objective, those of four ranks too."""
    fixed_microbatches: bool = False
    """Whether the microbatches must not change: for dropout, or a loss that is not linear."""
    kinds: frozenset[str] | None = None
    """The kinds of layouts that must not matter; None for all."""

    @property
    def has_experts(self) -> bool:
        return "num_moe_experts" in self.changes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The division of a model over ranks, or of a batch over microbatches."""

    name: str
    kind: str
    """Its line in the summary."""
    ranks: int
    model: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int = MICRO_BATCH
    """For objectives that it does not change; `MICRO_BATCH` for others."""
    sampled: bool = False
    """Whether every model is tried in it, although it has four ranks."""

    def suits(self, model: Model) -> bool:
        placed = self.model.get("pipeline_model_parallel_layout", "")
        if placed and ("m" in placed) != ("mtp_num_layers" in model.changes):
            return False
        if model.kinds is not None and self.kind not in model.kinds:
            return False
        if model.has_experts:
            # megatron-core rejects experts under tensor parallelism without sequence parallelism.
            return _SIZES["tp"] not in self.model or "sequence_parallel" in self.model
        return self.kind != "expert"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss that is minimized."""

    normalization: Literal["token", "microbatch"] = "token"
    pattern: Literal[1, 2] = 2

    @override
    def __str__(self) -> str:
        return f"{self.normalization}, pattern {self.pattern}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    model: Model
    layout: Layout
    objective: Objective = Objective()
    steps: int = STEPS

    @property
    def micro_batch_size(self) -> int:
        free = self.objective == Objective() and not self.model.fixed_microbatches
        return self.layout.micro_batch_size if free else MICRO_BATCH

    @property
    def is_the_reference(self) -> bool:
        return self.layout.ranks == 1 and self.micro_batch_size == MICRO_BATCH

    def alone(self) -> "Case":
        """Return the same on one process."""
        return replace(self, layout=ALONE)

    def model_config(self) -> GPTModelConfig:
        values = {"vocab_size": 61, "pipeline_dtype": None}
        return tiny_gpt(**(values | dict(self.model.changes) | dict(self.layout.model)))


_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def _layout(
    name: str,
    kind: str,
    ranks: int,
    sizes: str = "",
    *,
    mbs: int = MICRO_BATCH,
    ddp: Mapping[str, bool | int] | None = None,
    sampled: bool = False,
    **model: Any,
) -> Layout:
    """Make a layout of sizes such as ``"tp2 sp pp2"``."""
    for size in sizes.split():
        letters = size.rstrip("0123456789")
        if letters == "sp":
            model["sequence_parallel"] = True
        else:
            model[_SIZES[letters]] = int(size.removeprefix(letters))
    return Layout(
        name=name,
        kind=kind,
        ranks=ranks,
        model=model,
        ddp=ddp or {},
        micro_batch_size=mbs,
        sampled=sampled,
    )


ALONE = _layout("one process", "microbatches", 1)

_NO_OVERLAP = {"overlap_grad_reduce": False, "overlap_param_gather": False}
_PLAIN_DDP = _NO_OVERLAP | {"use_distributed_optimizer": False}
_SMALL_BUCKETS = {"bucket_size": 5000}
_ALIGNED_GATHER = {"align_param_gather": True}


def _placed(layers: str) -> dict[str, Any]:
    return {"pipeline_model_parallel_layout": layers}


_ONE_THEN_THREE: dict[str, Any] = {"num_layers_in_first_pipeline_stage": 1}
_GROUPS_OF_FOUR: dict[str, Any] = {"microbatch_group_size_per_vp_stage": 4}

LAYOUTS = (
    _layout("1 microbatch", "microbatches", 1, mbs=8),
    _layout("8 microbatches", "microbatches", 1, mbs=1),
    _layout("DP2", "data", 2, mbs=1, ddp=_SMALL_BUCKETS),
    _layout("DP2, no overlap", "data", 2, mbs=4, ddp=_NO_OVERLAP),
    _layout("DP2, no distributed optimizer", "data", 2, ddp=_PLAIN_DDP),
    _layout("DP4", "data", 4, mbs=1, sampled=True),
    _layout("TP2", "tensor", 2, "tp2"),
    _layout("TP4", "tensor", 4, "tp4", mbs=8),
    _layout("TP2+SP", "tensor, sequence", 2, "tp2 sp", mbs=4),
    _layout("TP4+SP", "tensor, sequence", 4, "tp4 sp", mbs=8),
    _layout("PP2", "pipeline", 2, "pp2", mbs=1),
    _layout("PP2, 1 microbatch", "pipeline", 2, "pp2", mbs=8),
    _layout("PP2, 1 + 3 layers", "pipeline", 2, "pp2", **_ONE_THEN_THREE),
    _layout("PP3, MTP alone", "pipeline", 3, "pp3", **_placed("Etttt|m|L")),
    _layout("PP3, layers alone", "pipeline", 3, "pp3", **_placed("E|tttt|L")),
    _layout("PP4", "pipeline", 4, "pp4"),
    _layout("PP4, 2 microbatches", "pipeline", 4, "pp4", mbs=4),
    _layout("PP2xVPP2", "interleaved pipeline", 2, "pp2 vpp2", mbs=1),
    _layout("PP2xVPP2, groups of 4", "interleaved pipeline", 2, "pp2 vpp2", **_GROUPS_OF_FOUR),
    _layout("CP2", "context", 2, "cp2", mbs=4),
    _layout("CP4", "context", 4, "cp4", mbs=8),
    _layout("EP2", "expert", 2, "ep2"),
    _layout("EP2xCP2", "expert", 2, "ep2 cp2", mbs=4),
    _layout("EP2xTP2+SP, ETP1", "expert", 2, "ep2 tp2 sp etp1", mbs=4),
    _layout("ETP2", "expert", 2, "etp2", mbs=4),
    _layout("EP4", "expert", 4, "ep4", mbs=1),
    _layout("EP2xDP2", "expert", 4, "ep2", sampled=True),
    _layout("EP2xETP2", "expert", 4, "ep2 etp2"),
    _layout("EP2xTP2+SP", "expert", 4, "ep2 tp2 sp", mbs=4, sampled=True),
    _layout("EP2xTP2+SPxDP2, ETP1", "expert", 4, "ep2 tp2 sp etp1", mbs=4),
    _layout("EP2xCP2xDP2", "expert", 4, "ep2 cp2", mbs=4, sampled=True),
    _layout("EP2xPP2", "expert", 4, "ep2 pp2", mbs=4),
    _layout("EP2xPP2xVPP2", "expert", 4, "ep2 pp2 vpp2"),
    _layout("DP2xTP2+SP", "mixed", 4, "tp2 sp", mbs=4),
    _layout("DP2xPP2", "mixed", 4, "pp2"),
    _layout("DP2xPP2xVPP2", "mixed", 4, "pp2 vpp2", ddp=_ALIGNED_GATHER),
    _layout("CP2xDP2", "mixed", 4, "cp2", mbs=4, sampled=True),
    _layout("CP2xTP2+SP", "mixed", 4, "cp2 tp2 sp", mbs=8),
    _layout("CP2xPP2", "mixed", 4, "cp2 pp2", mbs=4),
    _layout("TP2xPP2", "mixed", 4, "tp2 pp2", mbs=4),
    _layout("TP2+SPxPP2xVPP2", "mixed", 4, "tp2 sp pp2 vpp2", mbs=4, sampled=True),
)

_GPT2: dict[str, Any] = {
    "share_embeddings_and_output_weights": True,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "gated_linear_unit": False,
    "activation_func": functional.gelu,
    "position_embedding_type": "learned_absolute",
    "num_query_groups": None,
}
_RECOMPUTED: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
_EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}

MODELS = (
    Model(name="llama", everywhere=True),
    Model(name="gpt2", changes=_GPT2),
    Model(
        name="recomputed",
        changes={
            "share_embeddings_and_output_weights": True,
            "num_query_groups": 1,
            "qk_layernorm": True,
            "window_size": (6, 0),
        }
        | _RECOMPUTED,
    ),
    Model(name="mtp", changes={"mtp_num_layers": 1}),
    Model(
        name="mtp-tied",
        changes={"mtp_num_layers": 1, "share_embeddings_and_output_weights": True},
    ),
    Model(name="experts", changes=_EXPERTS, everywhere=True),
    Model(
        name="experts-allgather",
        changes=_EXPERTS
        | {
            "share_embeddings_and_output_weights": True,
            "normalization": "LayerNorm",
            "gated_linear_unit": False,
            "activation_func": functional.gelu,
            "moe_token_dispatcher_type": "allgather",
        },
    ),
    Model(
        name="experts-balanced",
        changes=_EXPERTS
        | {
            "moe_z_loss_coeff": 1e-2,
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 1e-1,
            "moe_shared_expert_intermediate_size": 24,
            "moe_layer_freq": 2,
        },
    ),
    Model(
        name="experts-aux-loss",
        changes=_EXPERTS
        | {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-1},
        fixed_microbatches=True,
    ),
    Model(
        name="dropout",
        changes={"hidden_dropout": 0.1, "attention_dropout": 0.1},
        fixed_microbatches=True,
        kinds=frozenset({"tensor"}),
    ),
    Model(
        name="dropout-recomputed",
        changes={"hidden_dropout": 0.1, "attention_dropout": 0.1} | _RECOMPUTED,
        fixed_microbatches=True,
        kinds=frozenset({"tensor"}),
    ),
    Model(
        name="attention-dropout",
        changes={"attention_dropout": 0.1},
        fixed_microbatches=True,
        kinds=frozenset({"tensor", "tensor, sequence", "context"}),
    ),
    Model(name="llama-bf16", precision="bf16"),
)
OBJECTIVES = (
    Objective(),
    Objective(pattern=1),
    Objective(normalization="microbatch"),
    Objective(normalization="microbatch", pattern=1),
)


def complete() -> Iterator[Case]:
    """Yield every model in token normalization of sums, some of them for all objectives."""
    for model in MODELS:
        for objective in OBJECTIVES if model.everywhere else OBJECTIVES[:1]:
            in_all = model.everywhere and objective == OBJECTIVES[0]
            for layout in LAYOUTS:
                case = Case(model=model, layout=layout, objective=objective)
                belongs = in_all or layout.ranks < 4 or layout.sampled
                if belongs and layout.suits(model) and not case.is_the_reference:
                    yield case


def sample() -> list[Case]:
    """Return few cases that have every layout, and every model with every objective of its own."""
    seen: set[object] = set()
    chosen = []
    cases = list(complete())
    for wanted in (2, 1):
        for case in cases:
            new = {case.layout.name, (case.model.name, case.objective)} - seen
            if len(new) >= wanted:
                seen |= new
                chosen.append(case)
    return sorted(chosen, key=cases.index)
