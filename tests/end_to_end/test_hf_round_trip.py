"""A model of Hugging Face's comes back from training with its own config.json."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from bridge.cli import main
from hf_models import LLAMA3_ROPE, write_folder
from ranks import run_ranks

WORDS: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 4,
    "rope_parameters": {"rope_theta": 500000.0, **LLAMA3_ROPE},
    "initializer_range": 0.3,
    "attention_dropout": 0.1,
    "dtype": "float32",
    "_name_or_path": "somebody/tiny",
    "pretraining_tp": 1,
    "use_cache": False,
    "nobody_knows": {"this": [1, None]},
}
GENERATION = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 3]}
TRAIN = (
    *("train.train_iters=1", "train.global_batch_size=2", "train.micro_batch_size=2"),
    *("model.seq_length=16", "tokenizer.type=null", "tokenizer.vocab_size=65"),
    *("dataset.mock=true", "validation.eval_iters=0", "logger.tensorboard=false"),
    *("model.attention_dropout=0.0", "checkpoint.save_at_end=true"),
)


def bridge(*arguments: str) -> None:
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        assert main(arguments) == 0, written.getvalue()


def test_config_json_comes_back_field_by_field_from_training_and_merging(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", **WORDS)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    source = json.loads((folder / "config.json").read_text())

    def commands() -> None:
        os.chdir(tmp_path)
        bridge("import-hf", "model", "--output", "imported")
        bridge("finetune", "gpt-tiny", "--from", "imported", *TRAIN, "--run-dir", "whole")
        lora = ("peft.method=lora", "--run-dir", "adapters")
        bridge("finetune", "gpt-tiny", "--from", "whole", *TRAIN, *lora)
        bridge("merge", "adapters", "--output", "merged")
        for checkpoint in ("imported", "whole", "merged"):
            bridge("export", checkpoint, "--to", "hf", "--output", f"{checkpoint} hf")
        bridge("export", "merged", "--to", "hf", "--output", "bf16 hf", "--dtype", "bf16")

    run_ranks(1, commands, process_group=False, timeout=100)
    for name in ("imported hf", "whole hf", "merged hf", "bf16 hf"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written == source | {"dtype": "bfloat16" if name == "bf16 hf" else "float32"}
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert generation == GENERATION
