"""Contradictions within and across sections. Every check adds lines; none stops the others."""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.batch_sizes import BatchSizes
from bridge.training.config.checks.bounds import problems_of_bounds
from bridge.training.config.checks.optional_methods import misspelt_methods
from bridge.training.config.checks.pipeline_layout import placement_problems
from bridge.training.config.checks.unsupported import unsupported_settings
from bridge.training.config.checks.urls import url_problems
from bridge.training.config.container import SECTIONS, ConfigContainer
from bridge.training.config.layout import Layout, layout_of
from bridge.training.config.schema.megatron_errors import ERRORS, is_raised_by_library, problem_of
from bridge.training.config.schema.paths import parts_of
from bridge.training.contracts import ArrangesRanks, ChecksItself, DerivesFields, DrawsLayout
from bridge.training.usage_error import is_usage_error


@runtime_checkable
class HasSequenceLength(Protocol):
    """A model that says how long its samples are."""

    seq_length: int


@runtime_checkable
class CanBeFinalized(Protocol):
    """A model section that defers megatron-core's own checks until it is asked."""

    def finalized(self) -> Any:
        """Return a copy that megatron-core has checked and completed."""
        ...


def validate(config: ConfigContainer, *, world_size: int, refused: set[str]) -> list[str]:
    """Return a line for each contradiction in a config whose derived values are filled in.

    `refused` names fields whose values had the wrong type; lines about those are left out, since
    they would speak of a value that nobody gave.
    """
    urls = url_problems(config)
    refused = refused | urls.keys()
    ours = [
        *unsupported_settings(config),
        *problems_of_bounds(config),
        *_own_checks(config, refused),
    ]
    lines = [
        *_train(config),
        *_validation(config),
        *_schedule(config),
        *_ddp(config),
        *_others(config),
        *_model(config, world_size, refused, ours),
        *ours,
        *misspelt_methods(config),
    ]
    others = [line for line in lines if not any(_mentions(line, path) for path in refused)]
    return [*itertools.chain(*urls.values()), *others]


def _mentions(line: str, path: str) -> bool:
    return re.search(_mention_of(path), line) is not None


def _mention_of(path: str) -> str:
    return rf"(?<![\w.]){re.escape(path)}(?![\w.])"


def rebuilt_sections(config: ConfigContainer, refused: set[str]) -> list[str]:
    """Run megatron-core's own checks of optimizer and ddp on their present values.

    These dataclasses check and complete themselves when they are constructed, which was before
    the values were set: both are constructed anew, in place.
    """
    problems = []
    for name in ("optimizer", "ddp"):
        if any(path.startswith(f"{name}.") for path in refused):
            continue
        section = getattr(config, name)
        try:
            setattr(config, name, dataclasses.replace(section))
        except ERRORS as error:
            if not is_usage_error(error) and not is_raised_by_library(error):
                raise
            problem, named = problem_of(error, section, name, dataclasses.replace)
            if not _is_rejected(
                {f"{name}.{field}" for field in named}, unsupported_settings(config)
            ):
                problems.append(problem)
    return problems


def _is_rejected(paths: Collection[str], lines: Iterable[str]) -> bool:
    """Whether a line is about one of these fields first of all."""
    beginnings = tuple(f"{path}{sign}" for path in paths for sign in "=:")
    return any(line.startswith(beginnings) for line in lines)


def _positive(config: ConfigContainer, section: str, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(getattr(config, section), name)
        if value is not None and value <= 0:
            yield f"{section}.{name}={value} must be positive"


def _not_negative(config: ConfigContainer, section: str, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(getattr(config, section), name)
        if value is not None and value < 0:
            yield f"{section}.{name}={value} must not be negative"


def _train(config: ConfigContainer) -> Iterator[str]:
    train = config.train
    lengths = {
        f"train.{name}": getattr(train, name) for name in ("train_iters", "train_samples", "epochs")
    }
    given = [path for path, value in lengths.items() if value is not None]
    if len(given) != 1:
        what = " and ".join(f"{path}={lengths[path]}" for path in given) or "none"
        yield (
            "exactly one of train.train_iters, train.train_samples and train.epochs must be "
            f"given, got {what}"
        )
    yield from _positive(config, "train", "train_iters", "train_samples", "epochs")
    yield from _positive(config, "train", "micro_batch_size", "global_batch_size")
    yield from _not_negative(config, "train", "num_workers", "manual_gc_interval")
    yield from _positive(config, "train", "time_limit_minutes")
    if train.spike_factor is not None and train.spike_factor <= 1:
        yield (
            f"train.spike_factor={train.spike_factor} must be above 1: it is a multiple of the "
            "mean of recent losses"
        )
    batch, samples = train.global_batch_size, train.train_samples
    # Of a run that goes on, what is left has to be one (bridge.training.data.run_length).
    if batch > 0 and samples is not None and samples % batch and not config.checkpoint.resume:
        yield (
            f"train.train_samples={samples} is not a multiple of "
            f"train.global_batch_size={batch}; the nearest is {_nearest_multiple(samples, batch)}"
        )


def _nearest_multiple(number: int, base: int) -> int:
    return max(1, round(number / base)) * base


def _validation(config: ConfigContainer) -> Iterator[str]:
    yield from _positive(config, "validation", "eval_interval")
    yield from _not_negative(config, "validation", "eval_iters")
    yield from _positive(config, "validation", "time_limit_minutes")


def _schedule(config: ConfigContainer) -> Iterator[str]:
    scheduler, optimizer = config.scheduler, config.optimizer
    fraction, warmup = scheduler.lr_warmup_fraction, scheduler.lr_warmup_iters
    if fraction is not None and warmup is not None:
        yield (
            f"scheduler.lr_warmup_fraction={fraction} and scheduler.lr_warmup_iters={warmup} "
            "exclude each other: remove one"
        )
    if fraction is not None and not 0 <= fraction < 1:
        yield f"scheduler.lr_warmup_fraction={fraction} must be at least 0 and below 1"
    yield from _positive(config, "scheduler", "lr_decay_iters", "lr_wsd_decay_iters")
    yield from _not_negative(
        config, "scheduler", "lr_warmup_iters", "start_weight_decay", "end_weight_decay"
    )
    horizon_name = "scheduler.lr_decay_iters" if scheduler.lr_decay_iters else "train.train_iters"
    horizon = scheduler.lr_decay_iters or config.train.train_iters
    if horizon and warmup is not None and warmup >= horizon:
        yield (
            f"scheduler.lr_warmup_iters={warmup} must be below {horizon_name}={horizon}; "
            "scheduler.lr_warmup_fraction fits a run of any length"
        )
    decay = scheduler.lr_wsd_decay_iters
    if scheduler.lr_decay_style == "WSD":
        if decay is None:
            yield "scheduler.lr_decay_style=WSD needs scheduler.lr_wsd_decay_iters"
        elif horizon and decay + (warmup or 0) > horizon:
            yield (
                f"scheduler.lr_wsd_decay_iters={decay} and the warm-up are longer than "
                f"{horizon_name}={horizon}"
            )
    if optimizer.lr is None:
        yield "optimizer.lr has no value; give the peak learning rate"
        return
    yield from _not_negative(config, "optimizer", "lr", "min_lr", "weight_decay", "clip_grad")
    if optimizer.min_lr is not None and optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}"
    if not 0 <= scheduler.lr_warmup_init <= optimizer.lr:
        yield (
            f"scheduler.lr_warmup_init={scheduler.lr_warmup_init} must be between 0 and "
            f"optimizer.lr={optimizer.lr}"
        )
    start, end = (
        optimizer.weight_decay if value is None else value
        for value in (scheduler.start_weight_decay, scheduler.end_weight_decay)
    )
    style = scheduler.weight_decay_incr_style
    if not 0 <= start <= end or (style == "constant" and start != end):
        yield (
            f"scheduler.start_weight_decay={start} and scheduler.end_weight_decay={end} do not fit "
            f"scheduler.weight_decay_incr_style={style}: the decay may rise, with the style linear "
            "or cosine, and not fall"
        )


def _ddp(config: ConfigContainer) -> Iterator[str]:
    ddp = config.ddp
    if ddp.overlap_param_gather and not ddp.use_distributed_optimizer:
        yield (
            "ddp.overlap_param_gather=true needs ddp.use_distributed_optimizer=true: only the "
            "distributed optimizer gathers parameters"
        )
    if config.optimizer.optimizer == "sgd" and ddp.use_distributed_optimizer:
        yield (
            "optimizer.optimizer=sgd cannot be distributed, as megatron-core saves no such state: "
            "set ddp.use_distributed_optimizer=false and ddp.overlap_param_gather=false"
        )
    if ddp.check_for_nan_in_grad and config.train.nan_action in ("skip", "log"):
        yield (
            "ddp.check_for_nan_in_grad=true raises at gradients that are NaN, which "
            f"train.nan_action={config.train.nan_action} lets pass: set it to false, or "
            "train.nan_action=raise_at_once"
        )
    if ddp.overlap_param_gather and not ddp.overlap_grad_reduce:
        yield "ddp.overlap_param_gather=true needs ddp.overlap_grad_reduce=true"
    if ddp.average_in_collective and config.train.loss_normalization == "token":
        yield (
            "ddp.average_in_collective=true would divide by the ranks what "
            "train.loss_normalization=token divides by the tokens: set it to false, or "
            "train.loss_normalization=microbatch"
        )
    if ddp.num_distributed_optimizer_instances > 1:
        yield (
            f"ddp.num_distributed_optimizer_instances={ddp.num_distributed_optimizer_instances} is "
            "not supported: the optimizer's state is spread over all data-parallel ranks; set it "
            "to 1"
        )
    if ddp.nccl_ub and config.dist.device == "cpu":
        yield "ddp.nccl_ub=true needs NCCL, which dist.device=cpu has not: set it to false"
    for name in ("use_megatron_fsdp", "use_custom_fsdp"):
        if getattr(ddp, name):
            yield f"ddp.{name}=true is not supported: the loop uses the DDP wrapper; leave it out"


def _others(config: ConfigContainer) -> Iterator[str]:
    yield from _positive(config, "logger", "log_interval")
    if config.logger.timing_log_level not in (0, 1, 2):
        yield f"logger.timing_log_level={config.logger.timing_log_level} must be 0, 1 or 2"
    yield from _positive(config, "checkpoint", "save_interval")
    yield from _not_negative(config, "checkpoint", "keep_last")
    if config.checkpoint.step is not None and not config.checkpoint.resume:
        yield (
            f"checkpoint.step={config.checkpoint.step} is that of a run to continue: add --resume "
            "(checkpoint.resume=true), or leave it out and give the checkpoint's own path"
        )
    if config.dist.timeout_minutes <= 0:
        yield f"dist.timeout_minutes={config.dist.timeout_minutes} must be positive"
    yield from _not_negative(config, "rng", "seed")


def _model(
    config: ConfigContainer, world_size: int, refused: set[str], others: list[str]
) -> Iterator[str]:
    ours = list(_model_in_layout(config, world_size))
    told = _by_their_sources(config, ours)
    if told and isinstance(config.model, DrawsLayout) and world_size >= 1:
        drawn = config.model.layout_picture(world_size) or ""
        told[-1] += "".join(f"\n      {line}" for line in drawn.splitlines())
    yield from told
    if not any(path.startswith("model.") for path in refused):
        for path, part in parts_of(config.model, "model"):
            yield from _megatrons_checks(part, [*ours, *others], path)


def _by_their_sources(config: ConfigContainer, lines: list[str]) -> list[str]:
    """Name sizes that the model's section fills in by the field of the same name they come from."""
    lines = list(lines)
    if isinstance(config.model, DerivesFields):
        for name, (_, reason) in config.model.derived_fields(config).items():
            source = (reason or "").partition("=")[0]
            if source.rpartition(".")[2] == name.rpartition(".")[2]:
                lines = [re.sub(_mention_of(f"model.{name}"), source, line) for line in lines]
    return lines


def _model_in_layout(config: ConfigContainer, world_size: int) -> Iterator[str]:
    model = config.model
    sizes_fit = True
    if isinstance(model, ModelParallelConfig):
        for line in _parallel_sizes(config):
            sizes_fit = False
            yield line
    elif world_size >= 1 and isinstance(model, ArrangesRanks):
        for line in model.layout_problems(world_size):
            sizes_fit = False
            yield line
    if world_size < 1:
        yield f"the world size {world_size} must be positive"
    elif sizes_fit:
        layout = layout_of(model, world_size)
        yield from _batches(config, layout)
        if isinstance(model, ModelParallelConfig):
            yield from _ranks(model, layout)
            yield from _pipeline(model, layout)
            yield from _sequence(model, layout)
        for path, part in parts_of(model, "model"):
            if isinstance(part, TransformerConfig):
                sizes = layout_of(part, world_size)
                yield from _transformer(part, sizes, path)
                yield from _widths(part, sizes, path)
                yield from _experts(part, sizes, path)


def _megatrons_checks(model: Any, ours: list[str], path: str) -> Iterator[str]:
    """Yield what megatron-core has against the model, unless it is in `ours` in other words."""
    if not isinstance(model, CanBeFinalized):
        return
    try:
        _finalize_quietly(model)
    except ERRORS as error:
        if not is_usage_error(error) and not is_raised_by_library(error):
            raise
        problem, named = problem_of(error, model, path, _finalize_quietly)
        paths = [f"{path}.{name}" for name in named]
        # A problem of ours that speaks of all of them, or rejects one, says it better.
        if not _is_rejected(paths, ours) and not (
            paths and any(all(it in line for it in paths) for line in ours)
        ):
            yield problem


def _finalize_quietly(model: CanBeFinalized) -> None:
    # Its warnings come once more, to be seen, when the model is built.
    with warnings.catch_warnings(action="ignore"):
        model.finalized()


def _parallel_sizes(config: ConfigContainer) -> Iterator[str]:
    yield from _positive(
        config,
        "model",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    )


def _batches(config: ConfigContainer, layout: Layout) -> Iterator[str]:
    sizes = BatchSizes.of(config.train, layout.data)
    micro, batch, step = sizes.micro_batch, sizes.global_batch, sizes.global_microbatch
    if micro < 1 or batch < 1 or layout.data < 1:
        return
    if not sizes.is_divisible:
        yield (
            f"train.global_batch_size={batch} is not a multiple of train.micro_batch_size={micro} "
            f"times {layout.data} data-parallel ranks ({layout.world_size} ranks in all); the "
            f"nearest is {_nearest_multiple(batch, step)}"
        )
        return
    parts = layout.most_parts or layout.data
    if step % parts:
        yield (
            f"train.micro_batch_size={micro} times {layout.data} copies of the whole model are "
            f"{step} samples, which do not make {parts} equal parts for the module that has "
            f"{parts} copies; change train.micro_batch_size, or the copies"
        )
    model = config.model
    if isinstance(model, ModelParallelConfig) and (layout.virtual_pipeline or 1) > 1:
        yield from _interleaved_microbatches(model, layout, sizes.microbatches)


def _interleaved_microbatches(
    model: ModelParallelConfig, layout: Layout, microbatches: int
) -> Iterator[str]:
    group = model.microbatch_group_size_per_vp_stage or layout.pipeline
    if group < layout.pipeline:
        yield (
            f"model.microbatch_group_size_per_vp_stage={group} must be at least "
            f"model.pipeline_model_parallel_size={layout.pipeline}"
        )
    elif group > microbatches or 0 < microbatches % group < layout.pipeline:
        yield (
            f"{microbatches} microbatches a step do not fill an interleaved pipeline: change "
            f"train.global_batch_size to make it a multiple of {group} microbatches"
        )


def _ranks(model: ModelParallelConfig, layout: Layout) -> Iterator[str]:
    if layout.world_size % layout.model_ranks:
        yield (
            f"{layout.world_size} ranks are not a multiple of model.tensor_model_parallel_size="
            f"{layout.tensor} x model.pipeline_model_parallel_size={layout.pipeline} x "
            f"model.context_parallel_size={layout.context} = {layout.model_ranks}; start a "
            "multiple of that (--nproc, or a launcher), or lower one of the sizes"
        )
    elif layout.world_size % (layout.expert_tensor * layout.expert * layout.pipeline):
        yield (
            f"{layout.world_size} ranks are not a multiple of model.expert_tensor_parallel_size="
            f"{layout.expert_tensor} x model.expert_model_parallel_size={layout.expert} x "
            f"model.pipeline_model_parallel_size={layout.pipeline}"
        )
    if model.sequence_parallel and layout.tensor == 1:
        yield (
            "model.sequence_parallel=true needs model.tensor_model_parallel_size above 1; "
            "set it to false"
        )
    if model.overlap_moe_expert_parallel_comm and layout.expert == 1:
        yield (
            "model.overlap_moe_expert_parallel_comm=true needs model.expert_model_parallel_size "
            "above 1"
        )


def _pipeline(model: ModelParallelConfig, layout: Layout) -> Iterator[str]:
    virtual = layout.virtual_pipeline
    if virtual is not None and virtual > 1 and layout.pipeline == 1:
        yield (
            f"model.virtual_pipeline_model_parallel_size={virtual} needs "
            "model.pipeline_model_parallel_size above 1"
        )
    if model.overlap_p2p_comm and model.batch_p2p_comm:
        yield "model.overlap_p2p_comm=true needs model.batch_p2p_comm=false"
    if model.overlap_p2p_comm and layout.pipeline > 1 and (virtual or 1) == 1:
        yield (
            "model.overlap_p2p_comm=true needs model.virtual_pipeline_model_parallel_size above 1: "
            "only the interleaved schedule overlaps"
        )
    if not isinstance(model, TransformerConfig):
        return
    yield from placement_problems(model)
    uneven = (
        model.num_layers_in_first_pipeline_stage is not None
        or model.num_layers_in_last_pipeline_stage is not None
        or model.pipeline_model_parallel_layout is not None
        or model.account_for_embedding_in_pipeline_split
        or model.account_for_loss_in_pipeline_split
    )
    stages = layout.pipeline * (virtual or 1)
    if not uneven and model.num_layers % stages:
        times = f" x model.virtual_pipeline_model_parallel_size={virtual}" if virtual else ""
        yield (
            f"model.num_layers={model.num_layers} is not a multiple of "
            f"model.pipeline_model_parallel_size={layout.pipeline}{times} = {stages} stages"
        )


def _sequence(model: ModelParallelConfig, layout: Layout) -> Iterator[str]:
    if not isinstance(model, HasSequenceLength):
        return
    length, context, tensor = model.seq_length, layout.context, layout.tensor
    if not isinstance(length, int) or length < 1:
        yield f"model.seq_length={length} must be positive"
        return
    if context > 1 and length % (2 * context):
        yield (
            f"model.seq_length={length} is not a multiple of 2 x model.context_parallel_size="
            f"{context}: each rank takes two blocks, for balance"
        )
    elif model.sequence_parallel and (length // context) % tensor:
        yield (
            f"model.seq_length={length} on {context} context-parallel ranks is not a multiple of "
            f"model.tensor_model_parallel_size={tensor}, which model.sequence_parallel=true needs"
        )


def _transformer(model: TransformerConfig, layout: Layout, path: str) -> Iterator[str]:
    heads, hidden, groups = model.num_attention_heads, model.hidden_size, model.num_query_groups
    positive = True
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(model, name) < 1:
            positive = False
            yield f"{path}.{name}={getattr(model, name)} must be positive"
    if not positive:
        return
    if model.kv_channels is None and hidden % heads:
        yield (
            f"{path}.hidden_size={hidden} is not a multiple of {path}.num_attention_heads={heads}; "
            f"or give {path}.kv_channels"
        )
    if heads % layout.tensor:
        yield (
            f"{path}.num_attention_heads={heads} is not a multiple of "
            f"{path}.tensor_model_parallel_size={layout.tensor}"
        )
    if groups is not None:
        if groups < 1 or heads % groups:
            yield (
                f"{path}.num_query_groups={groups} does not divide "
                f"{path}.num_attention_heads={heads}"
            )
        elif groups % layout.tensor and layout.tensor % groups:
            yield (
                f"{path}.num_query_groups={groups} is neither a multiple nor a divisor of "
                f"{path}.tensor_model_parallel_size={layout.tensor}"
            )


def _widths(model: TransformerConfig, layout: Layout, path: str) -> Iterator[str]:
    """Yield the widths of MLPs that tensor-parallel ranks cannot share equally."""
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    expert, shared = model.moe_ffn_hidden_size, model.moe_shared_expert_intermediate_size
    dense = ("ffn_hidden_size", ffn, "tensor_model_parallel_size", layout.tensor)
    widths = [dense] if model.num_moe_experts is None or model.moe_layer_freq != 1 else []
    if model.num_moe_experts is not None:
        widths += [
            (
                "moe_ffn_hidden_size",
                expert or ffn,
                "expert_tensor_parallel_size",
                layout.expert_tensor,
            ),
            (
                "moe_shared_expert_intermediate_size",
                shared or 0,
                "tensor_model_parallel_size",
                layout.tensor,
            ),
        ]
    for name, width, size, ranks in widths:
        if width % ranks:
            yield f"{path}.{name}={width} is not a multiple of {path}.{size}={ranks}"


def _experts(model: TransformerConfig, layout: Layout, path: str) -> Iterator[str]:
    experts = model.num_moe_experts
    if experts is None:
        if layout.expert > 1:
            yield (
                f"{path}.expert_model_parallel_size={layout.expert} needs experts: give "
                f"{path}.num_moe_experts"
            )
        return
    if experts % layout.expert:
        yield (
            f"{path}.num_moe_experts={experts} is not a multiple of "
            f"{path}.expert_model_parallel_size={layout.expert}"
        )
    if layout.tensor > 1 and not model.sequence_parallel:
        yield (
            f"{path}.num_moe_experts={experts} on "
            f"{path}.tensor_model_parallel_size={layout.tensor} needs "
            f"{path}.sequence_parallel=true: without it every rank would route every token"
        )
    if layout.expert_tensor > 1 and model.add_bias_linear:
        yield (
            f"{path}.add_bias_linear=true on {path}.expert_tensor_parallel_size="
            f"{layout.expert_tensor} would add each bias of an expert {layout.expert_tensor} "
            "times: set the one to false or the other to 1"
        )
    if model.moe_z_loss_coeff == 0:
        yield (
            f"{path}.moe_z_loss_coeff=0 gives a z-loss whose value megatron-core divides by it; "
            "set it to null for none"
        )
    if model.mlp_chunks_for_training > 1:
        yield (
            f"{path}.mlp_chunks_for_training={model.mlp_chunks_for_training} would take each "
            "chunk of the positions for a sequence of the experts' balance losses; set it to 1"
        )


def _own_checks(config: ConfigContainer, refused: set[str]) -> Iterator[str]:
    for name in SECTIONS:
        section = getattr(config, name)
        if not isinstance(section, ChecksItself):
            continue
        try:
            yield from section.problems(config)
        except Exception:
            # A check may stumble over a value that is reported already. Any other way it is a bug.
            if not refused:
                raise
