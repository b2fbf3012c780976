"""Measure llama3-8b-lora on one GPU, from a model in Hugging Face's format with random weights.

    python tools/bench/llama_lora.py [--steps 20] [--warmup 8] [section.field=value ...]

It writes a folder of Llama 3 8B as a hub would give it (weights in bf16, a tokenizer trained on the
standard library's sources), then runs ``bridge import-hf`` and ``bridge finetune`` on it, on the
instruction set of the standard library's docstrings, packed. Needs transformers, 50 GB of disk and
40 GB of memory.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from measured_run import Measured, read_ours, run_process, steady_step_s

VOCABULARY, HIDDEN, MLP, KEYS = 128_256, 4096, 14_336, 1024
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
TOKENIZER_VOCABULARY = 32_000


def write_model(folder: Path, layers: int) -> None:
    """Write config.json and the weights, a file for each layer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    places: dict[str, str] = {}
    for number, tensors in enumerate(_files(layers)):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _files(layers: int) -> Iterator[dict[str, torch.Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return (0.02 * values).cpu()

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield {
            **{f"{prefix}.{name}.weight": normal(*shape) for name, shape in MATRICES.items()},
            f"{prefix}.input_layernorm.weight": ones.clone(),
            f"{prefix}.post_attention_layernorm.weight": ones.clone(),
        }
    yield {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
        "lm_head.weight": normal(VOCABULARY, HIDDEN),
        "model.norm.weight": ones,
    }


def write_tokenizer(folder: Path) -> None:
    """Train a byte-pair tokenizer on the standard library's sources and write it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(
        [str(path) for path in sources],
        vocab_size=TOKENIZER_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def measure(
    work: Path, checkpoint: Path, options: argparse.Namespace, overrides: Sequence[str]
) -> Measured:
    """Fine-tune, and read what the run wrote."""
    run_dir = work / "run"
    command = [sys.executable, "-m", "bridge.cli", "finetune", "llama3-8b-lora"]
    command += ["--from", str(checkpoint), "--run-dir", str(run_dir)]
    command += ["dataset.standard_library=true", f"train.train_iters={options.steps}"]
    command += ["validation.eval_iters=0", "checkpoint.save_at_end=false", "logger.log_interval=4"]
    command += ["logger.tensorboard=false", *overrides]
    metrics = run_dir / "metrics.jsonl"
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1"}
    process = run_process(
        command, environment, log=work / "log.txt", limit_s=options.limit_s, watch=metrics
    )
    print(process.tail(40), flush=True)
    measured = read_ours(process, metrics)
    measured.ms_per_step = 1000 * (steady_step_s(measured.windows, options.warmup) or 0.0)
    if measured.error is None and measured.ms_per_step:
        rows = {row["step"]: row for row in map(json.loads, metrics.read_text().splitlines())}
        steady = [window for window in measured.windows if window.first >= options.warmup]
        first, last = steady[0].first, steady[-1].last
        tokens = rows[last]["consumed_tokens"] - rows[first]["consumed_tokens"]
        measured.tokens_per_s = 1000 * tokens / (last - first) / measured.ms_per_step
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model, import it, fine-tune it; 1 if the run failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--warmup", type=int, default=8, help="steps left out of the rate, a multiple of 4"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit-s", type=float, default=400, help="time limit of the fine-tuning")
    parser.add_argument("--output", type=Path, default=None, help="folder for all that is written")
    options, overrides = parser.parse_known_args(arguments)
    work = options.output or Path(tempfile.mkdtemp(prefix="llama-lora-"))
    model, checkpoint = work / "model", work / "checkpoint"

    started = time.monotonic()
    write_model(model, options.layers)
    write_tokenizer(model)
    print(f"made the model in {time.monotonic() - started:.0f} s", flush=True)

    started = time.monotonic()
    command = [sys.executable, "-m", "bridge.cli", "import-hf", str(model)]
    subprocess.run([*command, "--output", str(checkpoint)], check=True)
    print(f"imported it in {time.monotonic() - started:.0f} s", flush=True)

    measured = measure(work, checkpoint, options, overrides)
    if measured.error or measured.tokens_per_s is None:
        print(f"failed: {measured.error or f'no logged window after step {options.warmup}'}")
        return 1
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    memory = measured.peak_memory_gib
    print(
        f"{card}: {measured.tokens_per_s:,.0f} tokens/s, {measured.ms_per_step:.1f} ms a step, "
        f"peak {'-' if memory is None else format(memory, '.2f')} GiB, "
        f"start to first step {measured.first_step_s:.1f} s, last loss {measured.last_loss:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
