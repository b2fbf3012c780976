"""Measure our loop against megatron.training: the same model, data, settings and card, in turn.

    python tools/bench/vs_megatron.py --model llama3-1b --seq-length 4096 \
        --micro-batch-size 4 --global-batch-size 16 --steps 30 --warmup 10 --repeats 3

Each side runs in a process of its own: ours as ``python -m bridge.cli pretrain``, theirs through
`megatron_rival.py`. A partial table follows every pair, so a time limit loses little.
"""

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measured_run import Measured, read_ours, read_theirs, run_process, steady_step_s

RIVAL = Path(__file__).with_name("megatron_rival.py")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes of a model, given to both sides."""

    recipe: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int
    tied: bool


MODELS = {
    "llama3-1b": ModelSize(
        recipe="llama3-1b", layers=16, hidden=2048, ffn=8192, heads=32, groups=8, vocab=128256,
        tied=True,
    ),
    "gpt-125m": ModelSize(
        recipe="gpt-125m", layers=12, hidden=768, ffn=2048, heads=12, groups=12, vocab=128256,
        tied=False,
    ),
    "gpt-tiny": ModelSize(
        recipe="gpt-tiny", layers=4, hidden=128, ffn=352, heads=4, groups=4, vocab=384, tied=False
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One setting, as our overrides and as megatron.training's flags."""

    what: str
    ours: str
    theirs: str


def equal_settings(options: argparse.Namespace) -> list[Setting]:
    """Return the settings: each one in the form of either side.

    megatron.training's vocabulary is one smaller and padded to the next multiple of 128, because
    its null tokenizer's last token ends documents; the model's is the same.
    """
    size, iters = MODELS[options.model], options.steps
    tied = options.tie_embeddings
    per_token = options.loss_normalization == "token"
    return [
        Setting("layers", f"model.num_layers={size.layers}", f"--num-layers {size.layers}"),
        Setting("hidden size", f"model.hidden_size={size.hidden}", f"--hidden-size {size.hidden}"),
        Setting("ffn size", f"model.ffn_hidden_size={size.ffn}", f"--ffn-hidden-size {size.ffn}"),
        Setting(
            "heads",
            f"model.num_attention_heads={size.heads} model.num_query_groups={size.groups}",
            f"--num-attention-heads {size.heads} --group-query-attention "
            f"--num-query-groups {size.groups}",
        ),
        Setting(
            "vocabulary",
            f"model.vocab_size={size.vocab} model.make_vocab_size_divisible_by=128 "
            f'tokenizer.type="null" tokenizer.vocab_size={size.vocab}',
            f"--tokenizer-type NullTokenizer --vocab-size {size.vocab - 1} "
            f"--make-vocab-size-divisible-by 128",
        ),
        Setting(
            "sequence",
            f"model.seq_length={options.seq_length}",
            f"--seq-length {options.seq_length} --max-position-embeddings {options.seq_length}",
        ),
        Setting(
            "tied embeddings",
            f"model.share_embeddings_and_output_weights={str(tied).lower()}",
            "" if tied else "--untie-embeddings-and-output-weights",
        ),
        Setting(
            "positions",
            "model.position_embedding_type=rope model.rotary_base=500000 model.rope_scaling=false",
            "--position-embedding-type rope --rotary-base 500000",
        ),
        Setting(
            "layer",
            "model.normalization=RMSNorm model.gated_linear_unit=true model.activation_func=silu "
            "model.add_bias_linear=false model.attention_dropout=0.0 model.hidden_dropout=0.0",
            "--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 "
            "--hidden-dropout 0",
        ),
        Setting(
            "kernels",
            "model.layer_spec=transformer_engine model.attention_backend=auto "
            "model.apply_rope_fusion=true model.bias_activation_fusion=true "
            "model.bias_dropout_fusion=true model.cross_entropy_loss_fusion=true "
            "model.cross_entropy_fusion_impl=native model.gradient_accumulation_fusion=false",
            "--transformer-impl transformer_engine --attention-backend auto "
            "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native "
            "--no-gradient-accumulation-fusion",
        ),
        Setting("precision", "mixed_precision.precision=bf16", "--bf16"),
        Setting(
            "batch",
            f"train.micro_batch_size={options.micro_batch_size} "
            f"train.global_batch_size={options.global_batch_size} train.train_iters={iters}",
            f"--micro-batch-size {options.micro_batch_size} "
            f"--global-batch-size {options.global_batch_size} --train-iters {iters}",
        ),
        Setting(
            "loss",
            f"train.loss_normalization={options.loss_normalization}",
            "--calculate-per-token-loss" if per_token else "",
        ),
        Setting(
            "optimizer",
            "optimizer.optimizer=adam optimizer.lr=3e-4 optimizer.min_lr=3e-5 "
            "optimizer.weight_decay=0.1 optimizer.clip_grad=1.0 optimizer.adam_beta1=0.9 "
            "optimizer.adam_beta2=0.95 optimizer.adam_eps=1e-8",
            "--optimizer adam --lr 3e-4 --min-lr 3e-5 --weight-decay 0.1 --clip-grad 1.0 "
            "--adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8",
        ),
        Setting(
            "schedule",
            "scheduler.lr_decay_style=cosine scheduler.lr_warmup_iters=2 "
            "scheduler.lr_warmup_fraction=null",
            "--lr-decay-style cosine --lr-warmup-iters 2",
        ),
        Setting(
            "data parallel",
            "ddp.use_distributed_optimizer=true ddp.overlap_grad_reduce=true "
            "ddp.overlap_param_gather=true ddp.grad_reduce_in_fp32=true",
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
            "--accumulate-allreduce-grads-in-fp32",
        ),
        Setting(
            "data",
            f"dataset.mock=true train.num_workers={options.num_workers} rng.seed=1234",
            f"--mock-data --num-workers {options.num_workers} --dataloader-type single "
            "--no-create-attention-mask-in-dataloader --seed 1234",
        ),
        Setting(
            "log",
            f"logger.log_interval={options.log_interval} logger.tensorboard=false",
            f"--log-interval {options.log_interval} --log-throughput --no-one-logger",
        ),
        Setting(
            "nothing else",
            "validation.eval_iters=0 checkpoint.save_at_end=false",
            f"--eval-iters 0 --eval-interval {iters + 1} --no-save-optim",
        ),
    ]


DIFFERENT_BY_DESIGN = """\
Each side keeps its own way of doing these:
  NaN checks          ours: train.check_for_nan=true, on the device, read at logged steps
                      theirs: check-for-nan-in-loss-and-grad, read by the host every microbatch
  rerun machine       ours: disabled          theirs: validate_results
  garbage collection  ours: every 100 steps   theirs: Python's own
--theirs-extra turns theirs off (--no-check-for-nan-in-loss-and-grad --rerun-mode disabled
--manual-gc --manual-gc-interval 100); --ours-extra and --theirs-extra change any setting above."""


@dataclass(kw_only=True)
class Comparison:
    """The runs so far, of each side."""

    ours: list[Measured] = field(default_factory=list)
    theirs: list[Measured] = field(default_factory=list)

    def ratios(self) -> list[float]:
        """Tokens per second of ours over theirs, pair by pair, where both finished."""
        return [
            ours.tokens_per_s / theirs.tokens_per_s
            for ours, theirs in zip(self.ours, self.theirs, strict=False)
            if ours.tokens_per_s and theirs.tokens_per_s
        ]


def our_command(options: argparse.Namespace, run_dir: Path) -> list[str]:
    """Return the command of our side, as a user starts it."""
    overrides = " ".join(setting.ours for setting in equal_settings(options)).split()
    recipe = MODELS[options.model].recipe
    command = [sys.executable, "-m", "bridge.cli", "pretrain", recipe, *overrides]
    return [*command, *shlex.split(options.ours_extra), "--run-dir", str(run_dir)]


def their_command(options: argparse.Namespace) -> list[str]:
    """Return the command of megatron.training's side."""
    flags = " ".join(setting.theirs for setting in equal_settings(options)).split()
    return [sys.executable, str(RIVAL), *flags, *shlex.split(options.theirs_extra)]


def free_port() -> int:
    """Find a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Build the environment of both sides."""
    changes = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return {**os.environ, **changes}


def measure(side: str, options: argparse.Namespace, repeat: int) -> Measured:
    """Run one side once."""
    folder = Path(options.output) / f"{side}-{repeat}"
    run_dir = folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    metrics = run_dir / "metrics.jsonl" if side == "ours" else None
    command = our_command(options, run_dir) if side == "ours" else their_command(options)
    process = run_process(
        command, environment(), log=folder / "log.txt", limit_s=options.limit_s, watch=metrics
    )
    measured = read_ours(process, metrics) if metrics else read_theirs(process)
    step_s = steady_step_s(measured.windows, options.warmup)
    if step_s is None:
        reason = f"no logged window after step {options.warmup}"
        measured.error = measured.error or reason
        print(f"{side} {repeat} failed: {measured.error}\n{process.tail()}", flush=True)
        return measured
    measured.ms_per_step = 1000 * step_s
    measured.tokens_per_s = options.global_batch_size * options.seq_length / step_s
    return measured


def card_rate() -> dict[str, float | str]:
    """Time the card's bf16 matrix product of 8192 cubed on random data, the median of 50."""
    import torch

    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        left @ right
    milliseconds = []
    for _ in range(50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(end))
    rate = 2 * n**3 / (statistics.median(milliseconds) * 1e9)
    return {"card": torch.cuda.get_device_name(), "bf16_tflops": rate}


def number(value: float | None, form: str) -> str:
    """Format a figure that a failed run does not have."""
    return "-" if value is None else format(value, form)


def table(comparison: Comparison) -> str:
    """Lay out every run, and the ratio with its spread."""
    rows = [("run", "tokens/s", "ms/step", "peak GiB", "first step s", "last loss", "TFLOP/s")]
    flops = next((run.flops_per_step for run in comparison.theirs if run.flops_per_step), None)
    for index in range(len(comparison.ours)):
        for side in (comparison.ours, comparison.theirs):
            if index >= len(side):
                continue
            run = side[index]
            tflops = flops / run.ms_per_step / 1e9 if flops and run.ms_per_step else None
            rows.append(
                (
                    f"{run.side} {index + 1}",
                    number(run.tokens_per_s, ",.0f"),
                    number(run.ms_per_step, ".2f"),
                    number(run.peak_memory_gib, ".2f"),
                    number(run.first_step_s, ".1f"),
                    number(run.last_loss, ".4f"),
                    number(tflops, ".0f"),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [map(str.rjust, row, widths) for row in rows]
    lines = ["  ".join(cells) for cells in padded]
    ratios = comparison.ratios()
    if ratios:
        each = " ".join(f"{ratio:.4f}" for ratio in ratios)
        lines.append(
            f"ratio of tokens/s, ours over theirs: {each}; median {statistics.median(ratios):.4f}, "
            f"spread {min(ratios):.4f} to {max(ratios):.4f}"
        )
    return "\n".join(lines)


def save(options: argparse.Namespace, comparison: Comparison, card: dict[str, float | str]) -> None:
    """Write the raw numbers."""
    document = {
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "settings": [asdict(setting) for setting in equal_settings(options)],
        "card": card,
        "ours": [asdict(run) for run in comparison.ours],
        "theirs": [asdict(run) for run in comparison.theirs],
        "ratios": comparison.ratios(),
    }
    path = Path(options.output) / f"{options.model}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama3-1b")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=10, help="steps left out of the rate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--log-interval", type=int, default=5)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument(
        "--loss-normalization",
        choices=("microbatch", "token"),
        default="microbatch",
        help="microbatch is megatron.training's default, token is ours",
    )
    parser.add_argument(
        "--tie-embeddings",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="as the published model has it, if not given",
    )
    parser.add_argument("--only", choices=("ours", "theirs"), help="run one side alone")
    parser.add_argument("--ours-extra", default="", metavar="OVERRIDES")
    parser.add_argument("--theirs-extra", default="", metavar="FLAGS")
    parser.add_argument("--limit-s", type=float, default=240, help="time limit of one run")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=3600,
        help="start no pair that would probably end later than this",
    )
    parser.add_argument("--output", default=None, help="folder of the logs and raw numbers")
    parser.add_argument("--settings", action="store_true", help="print both commands and stop")
    parser.add_argument("--card", action="store_true", help="measure the card alone")
    options = parser.parse_args(arguments)
    if options.tie_embeddings is None:
        options.tie_embeddings = MODELS[options.model].tied
    options.output = options.output or tempfile.mkdtemp(prefix="vs-megatron-")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both sides in turn and print the table; 1 if a run failed."""
    started = time.monotonic()
    options = parse(arguments)
    if options.card:
        print(json.dumps(card_rate()))
        return 0
    if options.settings:
        print(shlex.join(our_command(options, Path("RUN"))))
        print(shlex.join(their_command(options)))
        return 0
    # In a process of its own: a context held here would take memory from the runs.
    probe = [sys.executable, __file__, "--card"]
    card = json.loads(subprocess.run(probe, check=True, capture_output=True, text=True).stdout)
    print(f"{card['card']}: bf16 matrix product {card['bf16_tflops']:.0f} TFLOP/s", flush=True)
    print(DIFFERENT_BY_DESIGN, flush=True)
    comparison = Comparison()
    sides = {"ours": comparison.ours, "theirs": comparison.theirs}
    if options.only:
        sides = {options.only: sides[options.only]}
    longest = 0.0
    for repeat in range(1, options.repeats + 1):
        pair_start = time.monotonic()
        if pair_start - started + longest > options.budget_s:
            print(f"stopping after {repeat - 1} of {options.repeats} pairs: the budget is spent")
            break
        for side, runs in sides.items():
            runs.append(measure(side, options, repeat))
            save(options, comparison, card)
        longest = max(longest, time.monotonic() - pair_start)
        print(f"\nafter {repeat} of {options.repeats}:\n{table(comparison)}", flush=True)
        if any(runs[-1].error for runs in sides.values()):
            print("stopping: a run failed, and the next would too")
            break
    print(f"raw numbers and logs: {options.output}")
    return int(any(run.error for runs in sides.values() for run in runs))


if __name__ == "__main__":
    sys.exit(main())
