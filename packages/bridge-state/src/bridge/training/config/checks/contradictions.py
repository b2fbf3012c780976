"""Contradictions within and across our own sections, the optimizer and DDP."""

from collections.abc import Iterator

from megatron.core.model_parallel_config import ModelParallelConfig

from bridge.training.batch_sizes import BatchSizes
from bridge.training.config.container import ConfigContainer
from bridge.training.config.layout import Layout
from bridge.training.config.schema.errors import Problem


def contradictions(config: ConfigContainer) -> Iterator[Problem]:
    """Yield a problem for each contradiction, of a configuration with its derived values."""
    yield from _length_problems(config)
    yield from _schedule_problems(config)
    yield from _ddp_problems(config)
    yield from _checkpoint_problems(config)


def batch_problems(config: ConfigContainer, layout: Layout) -> Iterator[Problem]:
    """Yield the reasons why the global batch does not divide into microbatches on `layout`."""
    sizes = config.train.batch_sizes(layout.data)
    micro, batch, step = sizes.micro_batch, sizes.global_batch, sizes.global_microbatch
    if micro < 1 or batch < 1 or layout.data < 1:
        return
    if not sizes.is_divisible:
        yield Problem(
            ("train.global_batch_size", "train.micro_batch_size"),
            f"train.global_batch_size={batch}: is not a multiple of train.micro_batch_size={micro} "
            f"times {layout.data} data-parallel replicas (world size {layout.world_size}); the "
            f"nearest is {_nearest_multiple(batch, step)}",
        )
        return
    parts = layout.most_parts or layout.data
    if step % parts:
        yield Problem(
            ("train.micro_batch_size",),
            f"train.micro_batch_size={micro}: times {layout.data} replicas of the model it makes "
            f"{step} samples, not a multiple of the {parts} replicas of a module; change it, or "
            "the replicas",
        )
    model = config.model
    if isinstance(model, ModelParallelConfig) and (layout.virtual_pipeline or 1) > 1:
        yield from _interleaving_problems(model, layout, sizes)


def _length_problems(config: ConfigContainer) -> Iterator[Problem]:
    train = config.train
    lengths = {
        f"train.{name}": getattr(train, name) for name in ("train_iters", "train_samples", "epochs")
    }
    given = [path for path, value in lengths.items() if value is not None]
    if len(given) != 1:
        what = " and ".join(f"{path}={lengths[path]}" for path in given) or "none"
        yield Problem(
            tuple(lengths),
            "exactly one of train.train_iters, train.train_samples and train.epochs must be "
            f"given, got {what}",
        )
    batch, samples = train.global_batch_size, train.train_samples
    # Of a resumed run the rest has to be one (bridge.training.data.run_length).
    if batch > 0 and samples is not None and samples % batch and not config.checkpoint.resume:
        yield Problem(
            ("train.train_samples", "train.global_batch_size"),
            f"train.train_samples={samples}: is not a multiple of "
            f"train.global_batch_size={batch}; the nearest is {_nearest_multiple(samples, batch)}",
        )


def _nearest_multiple(number: int, base: int) -> int:
    return max(1, round(number / base)) * base


def _schedule_problems(config: ConfigContainer) -> Iterator[Problem]:
    yield from _warmup_problems(config)
    if config.optimizer.lr is None:
        yield Problem(("optimizer.lr",), "optimizer.lr: has no value; give the peak learning rate")
        return
    yield from _learning_rate_problems(config, config.optimizer.lr)
    yield from _weight_decay_problems(config)


def _warmup_problems(config: ConfigContainer) -> Iterator[Problem]:
    scheduler = config.scheduler
    fraction, warmup = scheduler.lr_warmup_fraction, scheduler.lr_warmup_iters
    if fraction is not None and warmup is not None:
        yield Problem(
            ("scheduler.lr_warmup_fraction", "scheduler.lr_warmup_iters"),
            f"scheduler.lr_warmup_fraction={fraction}: excludes "
            f"scheduler.lr_warmup_iters={warmup}; remove one",
        )
    horizon_name = "scheduler.lr_decay_iters" if scheduler.lr_decay_iters else "train.train_iters"
    horizon = scheduler.lr_decay_iters or config.train.train_iters
    if horizon and warmup is not None and warmup >= horizon:
        yield Problem(
            ("scheduler.lr_warmup_iters", horizon_name, "scheduler.lr_warmup_fraction"),
            f"scheduler.lr_warmup_iters={warmup}: must be below {horizon_name}={horizon}; lower "
            "it, or give scheduler.lr_warmup_fraction, which fits a run of any length",
        )
    decay = scheduler.lr_wsd_decay_iters
    if scheduler.lr_decay_style == "WSD":
        if decay is None:
            yield Problem(
                ("scheduler.lr_decay_style", "scheduler.lr_wsd_decay_iters"),
                "scheduler.lr_decay_style=WSD: needs scheduler.lr_wsd_decay_iters; give it",
            )
        elif horizon and decay + (warmup or 0) > horizon:
            yield Problem(
                ("scheduler.lr_wsd_decay_iters", horizon_name),
                f"scheduler.lr_wsd_decay_iters={decay}: together with the warm-up it is longer "
                f"than {horizon_name}={horizon}; lower it",
            )


def _learning_rate_problems(config: ConfigContainer, peak: float) -> Iterator[Problem]:
    lowest, first = config.optimizer.min_lr, config.scheduler.lr_warmup_init
    if lowest is not None and lowest > peak:
        yield Problem(
            ("optimizer.min_lr", "optimizer.lr"),
            f"optimizer.min_lr={lowest}: is above optimizer.lr={peak}; lower it",
        )
    if not 0 <= first <= peak:
        yield Problem(
            ("scheduler.lr_warmup_init", "optimizer.lr"),
            f"scheduler.lr_warmup_init={first}: must be between 0 and optimizer.lr={peak}; change "
            "it",
        )


def _weight_decay_problems(config: ConfigContainer) -> Iterator[Problem]:
    scheduler = config.scheduler
    start, end = (
        config.optimizer.weight_decay if value is None else value
        for value in (scheduler.start_weight_decay, scheduler.end_weight_decay)
    )
    style = scheduler.weight_decay_incr_style
    if not 0 <= start <= end or (style == "constant" and start != end):
        yield Problem(
            (
                "scheduler.start_weight_decay",
                "scheduler.end_weight_decay",
                "scheduler.weight_decay_incr_style",
            ),
            f"scheduler.start_weight_decay={start}: does not fit scheduler.end_weight_decay={end} "
            f"and scheduler.weight_decay_incr_style={style}; let the decay rise, with the style "
            "linear or cosine, or stay",
        )


def _ddp_problems(config: ConfigContainer) -> Iterator[Problem]:
    ddp = config.ddp
    if ddp.overlap_param_gather and not ddp.use_distributed_optimizer:
        yield Problem(
            ("ddp.overlap_param_gather", "ddp.use_distributed_optimizer"),
            "ddp.overlap_param_gather=true: needs ddp.use_distributed_optimizer=true, as only the "
            "distributed optimizer gathers parameters; set that, or this to false",
        )
    if config.optimizer.optimizer == "sgd" and ddp.use_distributed_optimizer:
        yield Problem(
            ("optimizer.optimizer", "ddp.use_distributed_optimizer", "ddp.overlap_param_gather"),
            "optimizer.optimizer=sgd: cannot be distributed, as megatron-core saves no such state; "
            "set ddp.use_distributed_optimizer=false and ddp.overlap_param_gather=false",
        )
    if ddp.check_for_nan_in_grad and config.train.nan_action in ("skip", "log"):
        yield Problem(
            ("ddp.check_for_nan_in_grad", "train.nan_action"),
            "ddp.check_for_nan_in_grad=true: raises at gradients that are NaN, which "
            f"train.nan_action={config.train.nan_action} lets pass; set it to false, or "
            "train.nan_action=raise_at_once",
        )
    if ddp.overlap_param_gather and not ddp.overlap_grad_reduce:
        yield Problem(
            ("ddp.overlap_param_gather", "ddp.overlap_grad_reduce"),
            "ddp.overlap_param_gather=true: needs ddp.overlap_grad_reduce=true; set that, or this "
            "to false",
        )


def _checkpoint_problems(config: ConfigContainer) -> Iterator[Problem]:
    if config.checkpoint.step is not None and not config.checkpoint.resume:
        yield Problem(
            ("checkpoint.step", "checkpoint.resume"),
            f"checkpoint.step={config.checkpoint.step}: is that of a run to continue; add --resume "
            "(checkpoint.resume=true), or leave it out and give the checkpoint's own path",
        )


def _interleaving_problems(
    model: ModelParallelConfig, layout: Layout, sizes: BatchSizes
) -> Iterator[Problem]:
    batch, microbatches = sizes.global_batch, sizes.microbatches
    group = model.microbatch_group_size_per_vp_stage or layout.pipeline
    if group < layout.pipeline:
        yield Problem(
            ("model.microbatch_group_size_per_vp_stage", "model.pipeline_model_parallel_size"),
            f"model.microbatch_group_size_per_vp_stage={group}: must be at least "
            f"model.pipeline_model_parallel_size={layout.pipeline}; raise it",
        )
    elif group > microbatches or 0 < microbatches % group < layout.pipeline:
        yield Problem(
            ("train.global_batch_size",),
            f"train.global_batch_size={batch}: makes {microbatches} microbatches a step, which do "
            f"not fill an interleaved pipeline; make it a multiple of {group} microbatches",
        )
