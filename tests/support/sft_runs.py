"""Runs of a tiny GPT on prompts and completions, packed into sequences or not."""

from pathlib import Path
from typing import Any

from bridge.gpt.data.sft.dataset_config import SFTDatasetConfig
from bridge.training.config import ConfigContainer, SchedulerConfig, TokenizerConfig
from gpt_models import tiny_gpt
from training_runs import gpt_run

LENGTH = 32
# Lengths from 11 to 16: any two fit into a sequence, and no three.
ROWS = [{"prompt": "p" * (6 + n % 3), "completion": "xyz"[n % 3] * (5 + n % 4)} for n in range(8)]


def sft_run(place: Path, *, packing: bool = False, **model: Any) -> ConfigContainer:
    """Return a run of which each step is one pass over `ROWS`, packed or not."""
    rows = place.parent / "rows.jsonl"
    section = tiny_gpt(**({"seq_length": LENGTH, "vocab_size": None} | model))
    dataset = SFTDatasetConfig(
        path=str(rows), packing=packing, cache_dir=str(place.parent / "cache")
    )
    config = gpt_run(place, section, dataset=dataset, tokenizer=TokenizerConfig())
    config.train.train_iters = 2
    # Warm-up and decay go by samples, of which a packed run has fewer.
    config.scheduler = SchedulerConfig(lr_decay_style="constant")
    config.optimizer.lr = 0.005
    config.train.global_batch_size = len(ROWS) // 2 if packing else len(ROWS)
    return config
