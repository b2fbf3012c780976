"""The sections of a run's configuration that do not come from megatron-core.

Names are megatron-core's where it has one. Every field is read somewhere. megatron-core's own
dataclasses (optimizer, DDP, model) are used as they are.
"""

from dataclasses import dataclass
from typing import Literal

from bridge.training.batch_sizes import BatchSizes
from bridge.training.local_paths import local_path

type AnomalyAction = Literal["raise", "raise_at_once", "skip", "log"]


@dataclass(kw_only=True)
class TrainConfig:
    """The length of the run, its batches and its objective."""

    train_iters: int | None = None
    """Optimizer steps. Exactly one of train_iters, train_samples and epochs is given."""
    train_samples: int | None = None
    """Samples to train on; must be a multiple of the global batch size."""
    epochs: int | None = None
    """Passes over the training data."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one rank."""
    global_batch_size: int = 1
    """Samples of one optimizer step, over all ranks and microbatches."""
    loss_normalization: Literal["token", "microbatch"] = "token"
    """token: the step's sum of losses divided by its sum of tokens. microbatch: Megatron-LM's mean
    of the microbatches' means, for porting."""
    num_workers: int = 0
    """Data loading processes of each rank; 0 loads in the training process."""
    check_for_nan: bool = True
    """Look for losses that are NaN or infinite, and react by nan_action."""
    nan_action: AnomalyAction = "raise"
    """raise: found at the next logged step or checkpoint, so that other steps need no host-device
    sync. raise_at_once and skip: found before the optimizer's step, with a host-device sync at
    every step; skip skips the step on every rank. log: a warning."""
    spike_factor: float | None = None
    """A microbatch is a spike if its loss is above this many times the mean of its rank's recent
    ones; None turns the search off."""
    spike_action: AnomalyAction = "log"
    """The reaction to a spike; values as of nan_action."""
    time_limit_minutes: float | None = None
    """End the run, with a checkpoint, after the step in which this time has passed, setup included.
    An evaluation that it cuts short is not logged."""
    manual_gc_interval: int = 100
    """Steps between Python garbage collections, at the same step on every rank; 0 leaves them to
    Python, which then stalls ranks at different times."""

    def batch_sizes(self, replicas: int) -> BatchSizes:
        """Return the sizes of a step's batch on this number of data-parallel replicas."""
        return BatchSizes(
            global_batch=self.global_batch_size,
            micro_batch=self.micro_batch_size,
            replicas=replicas,
        )


@dataclass(kw_only=True)
class ValidationConfig:
    """The times and the size of evaluations."""

    eval_interval: int | None = None
    """Steps between evaluations; None evaluates only at the end."""
    eval_iters: int | None = None
    """Global batches of one evaluation of a set, or all its samples if they are fewer; None takes
    all samples, 0 turns evaluation off."""
    eval_at_start: bool = False
    """Evaluate before the first step too."""
    time_limit_minutes: float | None = None
    """End an evaluation after the global batch in which this time has passed; its metrics are then
    those of the samples so far. Several sets are one evaluation."""


@dataclass(kw_only=True)
class SchedulerConfig:
    """The learning rate and weight decay over the run (the peak is optimizer.lr)."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay from optimizer.lr to optimizer.min_lr."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the decay horizon; exclusive with lr_warmup_iters."""
    lr_warmup_iters: int | None = None
    """Steps of warm-up; exclusive with lr_warmup_fraction."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    lr_decay_iters: int | None = None
    """Steps after which the rate has reached optimizer.min_lr; the length of the run if None."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the final decay of the WSD style."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the final decay of the WSD style."""
    start_weight_decay: float | None = None
    """Weight decay at the start; optimizer.weight_decay if None."""
    end_weight_decay: float | None = None
    """Weight decay at the end; optimizer.weight_decay if None."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the weight decay from start to end."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """The tokenizer of megatron-core that turns text into tokens."""

    type: Literal["bytes", "huggingface", "sentencepiece", "tiktoken", "null"] = "bytes"
    """bytes needs no files; null is for mock data."""
    model: str | None = local_path()
    """Directory (huggingface) or file (sentencepiece, tiktoken) of the tokenizer."""
    vocab_size: int | None = None
    """Number of tokens, for the null tokenizer."""


@dataclass(kw_only=True)
class LoggerConfig:
    """The metrics that are logged, when and where. metrics.jsonl is always written."""

    log_interval: int = 10
    """Steps between logged steps."""
    average: Literal["interval", "step"] = "interval"
    """interval: a logged metric is the mean over the steps since the previous logged step (as
    Megatron-LM's); a maximum is the largest, a total the sum; skipped steps do not count. step:
    the value of the logged step alone."""
    tensorboard: bool = True
    """Write the same values for TensorBoard."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project; None turns it off."""
    wandb_entity: str | None = None
    """The team or user that owns the project."""
    wandb_name: str | None = None
    """The run's name there; the run directory's name if None."""
    timing_log_level: int = 0
    """0, 1 or 2: how many of megatron-core's timers are logged (1 and 2 sync the device)."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """The run's directory, and what it saves and loads."""

    run_dir: str | None = local_path()
    """The run's directory; a new runs/RECIPE-TIMESTAMP if None."""
    resume: bool = False
    """Continue the run in run_dir; without it an existing run is rejected."""
    step: int | None = None
    """Continue from the checkpoint of this step (with resume); None takes the latest."""
    save_interval: int | None = None
    """Steps between checkpoints; None saves at the end only."""
    save_at_end: bool = True
    """Save a checkpoint when the run ends or is asked to stop."""
    keep_last: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    pretrained_checkpoint: str | None = local_path()
    """A run or a checkpoint whose weights a new run starts from; only the weights are taken."""


@dataclass(kw_only=True)
class DistConfig:
    """Devices and process groups."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPU where there is one; cpu tries the same run over gloo."""
    timeout_minutes: float = 10.0
    """Minutes that a collective may wait for the other ranks; 0.5 is thirty seconds."""


@dataclass(kw_only=True)
class RNGConfig:
    """Random numbers."""

    seed: int = 1234
    """Seed of the weights, the dropout and the data order."""
    layout_invariant_init: bool = True
    """Draw every weight as a function of the seed, its global name and its unsharded shape, so that
    runs under different parallel layouts start from the same model. Costs building each unsharded
    tensor once on every rank."""


@dataclass(kw_only=True)
class RerunConfig:
    """megatron-core's rerun state machine, which repeats a step to find faulty hardware."""

    rerun_mode: Literal["disabled", "validate_results", "report_determinism_stats"] = "disabled"
    """Other modes than disabled have a host-device sync at every step."""


@dataclass(kw_only=True)
class MixedPrecisionConfig:
    """The precision of the model. The optimizer's main copy of the weights is always float32."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on a GPU and fp32 on a CPU."""
