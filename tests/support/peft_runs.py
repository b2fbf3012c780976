"""Runs that train adapters on top of a small frozen GPT."""

from pathlib import Path
from typing import Any

from bridge.peft import LoRA
from bridge.training.config import CheckpointConfig, ConfigContainer, RNGConfig
from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import gpt_run, series

STEPS = 3
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24},
    "other": {},
}
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
SP: dict[str, Any] = {**TP, "sequence_parallel": True}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
EP: dict[str, Any] = {"expert_model_parallel_size": 2}


def base_run(directory: Path, kind: str = "dense", **layout: Any) -> ConfigContainer:
    """Return a run of a GPT of two layers; ``other`` has other weights."""
    config = gpt_run(directory, tiny_gpt(num_layers=2, **(KINDS[kind] | layout)))
    config.rng = RNGConfig(seed=8 if kind == "other" else 7)
    config.train.train_iters = 1
    return config


def train_bases(folder: Path) -> dict[str, Path]:
    """Train each kind for a step; return their runs, with a checkpoint each."""

    def train_all() -> None:
        for kind in KINDS:
            config = base_run(folder / kind, kind)
            config.checkpoint.save_at_end = True
            pretrain(config, forward_step)

    run_ranks(1, train_all)
    return {kind: folder / kind for kind in KINDS}


def adapted_run(
    directory: Path, base: Path | str | None, kind: str = "dense", method: Any = None, **layout: Any
) -> ConfigContainer:
    """Return a run of adapters, at a rate at which runs soon differ."""
    config = base_run(directory, kind, **layout)
    config.peft = method or LoRA(dim=4)
    config.optimizer.lr = 0.02
    config.train.train_iters = STEPS
    config.checkpoint = CheckpointConfig(
        run_dir=str(directory),
        pretrained_checkpoint=None if base is None else str(base),
        save_at_end=False,
    )
    return config


def train_adapters(config: ConfigContainer) -> dict[str, list[Any]]:
    """Train; return the losses and gradient norms that were logged."""
    pretrain(config, forward_step)
    run_dir = config.checkpoint.run_dir
    assert run_dir is not None
    return {name: series(run_dir, name) for name in ("lm loss", "grad_norm")}
