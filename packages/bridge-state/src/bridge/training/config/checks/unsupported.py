"""Settings of megatron-core that would have no effect in a run, as data.

A field at its default, or derived by resolution, is never rejected. Here are the settings that the
loop does not support, of the optimizer, the DDP wrapper and any model. Those that the layers do not
support are in `bridge.training.transformer.limits`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from bridge.training.config.derivation import transformer_configs
from bridge.training.config.schema.errors import Problem
from bridge.training.config.schema.fields import default_of, fields_of
from bridge.training.config.schema.to_plain import text_of
from bridge.training.spelling import did_you_mean

if TYPE_CHECKING:
    from bridge.training.config.container import ConfigContainer

type Condition = Callable[[Any, "ConfigContainer"], bool]
"""A condition on the dataclass that has the field, and on the configuration."""


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Fields that are rejected when they differ from their default, and the reason."""

    fields: str
    """Their names, separated by spaces."""
    why: str
    """The text after "section.field=value: "."""
    _: dataclasses.KW_ONLY
    what_to_do: str = "leave it out"
    unless: Condition | None = None
    """The condition under which the fields have their effect; None is never."""
    depends_on: tuple[str, ...] = ()
    """Paths of other fields that decide it, and that the text names."""
    overrides_only: bool = False
    """Reject values that an override set, and accept a recipe's: another override may have made
    them useless."""


def rejections_in(
    section: Any, path: str, config: "ConfigContainer", rules: Iterable[Rejection]
) -> Iterator[Problem]:
    """Yield a problem for each field of `section` that a rule rejects.

    Args:
        section: A dataclass of megatron-core's, or one that extends it.
        path: Its path, such as "model" or "optimizer".
        config: The configuration that it is part of, with derived values filled in.
        rules: In the order in which they are tried; one problem a field.
    """
    fields, reported = fields_of(section), set()
    for rule in rules:
        if rule.unless is not None and rule.unless(section, config):
            continue
        for name in rule.fields.split():
            where = f"{path}.{name}"
            if name not in fields or name in reported or config.provenance.is_derived(where):
                continue
            if rule.overrides_only and not config.provenance.is_given(where):
                continue
            value = getattr(section, name)
            if not (_is_default(value, fields[name]) or _completed_itself(section, name, value)):
                reported.add(name)
                text = f"{where}={text_of(value)}: {rule.why}; {rule.what_to_do}"
                yield Problem((where, *rule.depends_on), text)


def unsupported_settings(config: "ConfigContainer") -> Iterator[Problem]:
    """Yield a problem for each setting that the loop does not support."""
    yield from _optimizer_problems(config)
    yield from rejections_in(config.optimizer, "optimizer", config, OPTIMIZER)
    yield from rejections_in(config.ddp, "ddp", config, DDP)
    for path, part in transformer_configs(config).items():
        yield from rejections_in(part, path, config, MODEL)


def has_emerging_optimizers() -> bool:
    """Whether the package is installed that has Muon, Lion and SOAP."""
    return find_spec("emerging_optimizers") is not None


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    default = default_of(field)
    # A switch whose default is None may also be off.
    return value is default or bool(value == default) or (default is None and value is False)


def _completed_itself(section: Any, name: str, value: Any) -> bool:
    """Whether the dataclass itself gives the field this value when it is constructed."""
    try:
        anew = dataclasses.replace(section, **{name: default_of(fields_of(section)[name])})
    except (ValueError, AssertionError, RuntimeError, TypeError):
        return False
    return bool(getattr(anew, name) == value)


def _is(name: str) -> Condition:
    return lambda section, _: bool(getattr(section, name))


def _optimizer_is(*names: str) -> Condition:
    return lambda section, _: section.optimizer in names


def _on_gpu(_: Any, config: "ConfigContainer") -> bool:
    return config.dist.device == "cuda"


def _any_model_part(name: str) -> Condition:
    """Whether a transformer of the model has the switch on; a model without one may have it on."""

    def condition(_: Any, config: "ConfigContainer") -> bool:
        parts = transformer_configs(config).values()
        return not parts or any(getattr(part, name) for part in parts)

    return condition


def _scales_loss(section: Any, _: "ConfigContainer") -> bool:
    return bool(section.fp16 or section.bf16 or section.use_distributed_optimizer)


def _scales_loss_dynamically(section: Any, _: "ConfigContainer") -> bool:
    return bool(section.fp16 and section.loss_scale is None)


_EMERGING = ("muon", "lion")
_OPTIMIZERS = ("adam", "sgd", *_EMERGING)
# megatron-core 0.19 builds adaptive Muon in a way that no release of emerging-optimizers knows, and
# passes SOAP only a part of its settings.
_HALF_SUPPORTED = ("adaptive_muon", "soap", "dist_muon")


def _optimizer_problems(config: "ConfigContainer") -> Iterator[Problem]:
    name, field = config.optimizer.optimizer, "optimizer.optimizer"
    if name not in _OPTIMIZERS:
        why = "is not supported" if name in _HALF_SUPPORTED else "there is no such optimizer"
        hint = "" if name in _HALF_SUPPORTED else did_you_mean(name, _OPTIMIZERS)
        text = f"{field}={name}: {why}{hint}; take one of {', '.join(_OPTIMIZERS)}"
        yield Problem((field,), text)
    elif name in _EMERGING and not has_emerging_optimizers():
        yield Problem(
            (field,),
            f"{field}={name}: needs the package emerging-optimizers, which is not "
            "installed; install it, or take adam or sgd",
        )
    elif name in _EMERGING and config.ddp.use_distributed_optimizer:
        yield Problem(
            (field, "ddp.use_distributed_optimizer", "ddp.overlap_param_gather"),
            f"{field}={name}: cannot be distributed here; set "
            "ddp.use_distributed_optimizer=false and ddp.overlap_param_gather=false",
        )


_FSDP = "belongs to Megatron-FSDP, and the loop uses megatron-core's DDP wrapper"
_GRAPHS = "CUDA graphs are not supported yet"
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
_SHARED_MXFP8_BUFFER = Rejection(
    "reuse_grad_buf_for_mxfp8_param_ag",
    "the gradient buffer would hold the parameters, and nothing copies the new ones there before a "
    "step: the model would stay as it was",
)
_BARRIERS_OF_TIMERS = Rejection(
    "barrier_with_L1_time",
    "acts on timers that do not run with logger.timing_log_level=0",
    what_to_do="leave it out, or raise that",
    unless=lambda _, config: config.logger.timing_log_level > 0,
    depends_on=("logger.timing_log_level",),
)

OPTIMIZER = (
    _SHARED_MXFP8_BUFFER,
    Rejection(
        "use_layer_wise_distributed_optimizer",
        "the loop gathers and saves the state of megatron-core's distributed optimizer alone",
    ),
    Rejection(
        "overlap_param_gather_with_optimizer_step",
        "the loop gathers parameters in the forward pass",
        what_to_do="leave it out; ddp.overlap_param_gather=true overlaps that",
        depends_on=("ddp.overlap_param_gather",),
    ),
    Rejection(
        "optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload "
        "overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params",
        "the optimizer's state is not offloaded to the CPU",
    ),
    Rejection("optimizer_cuda_graph", _GRAPHS),
    Rejection(
        "adam_beta1 adam_beta2 adam_eps decoupled_weight_decay",
        "is read by Adam alone",
        what_to_do="leave it out, or set optimizer.optimizer=adam",
        # Those of Muon's and Lion's parameters that are no matrices are Adam's.
        unless=lambda section, _: section.optimizer != "sgd",
        overrides_only=True,
        depends_on=("optimizer.optimizer",),
    ),
    Rejection(
        "sgd_momentum",
        "is read by SGD alone",
        what_to_do="leave it out, or set optimizer.optimizer=sgd",
        unless=_optimizer_is("sgd"),
        depends_on=("optimizer.optimizer",),
    ),
    Rejection(
        "muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec "
        "muon_coefficient_type muon_num_ns_steps muon_tp_mode muon_extra_scale_factor "
        "muon_scalar_optimizer",
        "is read by Muon alone",
        what_to_do="leave it out, or set optimizer.optimizer=muon",
        unless=_optimizer_is("muon"),
        depends_on=("optimizer.optimizer",),
    ),
    Rejection(
        "lion_beta1 lion_beta2",
        "is read where Lion updates together with Muon, alone; by itself it has Adam's",
        what_to_do="leave it out, or set optimizer.muon_scalar_optimizer=lion",
        unless=lambda section, _: (
            (section.optimizer, section.muon_scalar_optimizer) == ("muon", "lion")
        ),
        depends_on=("optimizer.muon_scalar_optimizer",),
    ),
    Rejection(
        "adaptive_muon_moment2_method adaptive_muon_beta2 adaptive_muon_eps soap_shampoo_beta "
        "soap_precondition_frequency soap_use_kl_shampoo",
        "belongs to adaptive Muon or SOAP, which are not supported",
    ),
    Rejection(
        "loss_scale",
        "megatron-core scales no loss in float32 without the distributed optimizer",
        unless=_scales_loss,
    ),
    Rejection(
        "initial_loss_scale min_loss_scale loss_scale_window hysteresis",
        "a loss scale changes with the overflows of fp16 alone, and where optimizer.loss_scale "
        "is not given",
        what_to_do="leave it out, or set mixed_precision.precision=fp16",
        unless=_scales_loss_dynamically,
        depends_on=("optimizer.loss_scale", "mixed_precision.precision"),
    ),
    Rejection(
        "decoupled_min_lr",
        "is the lowest rate of optimizer.decoupled_lr, which is not given",
        what_to_do="leave it out, or give optimizer.decoupled_lr",
        unless=lambda section, _: section.decoupled_lr is not None,
        depends_on=("optimizer.decoupled_lr",),
    ),
    Rejection(
        "apply_wd_to_qk_layernorm",
        "the model has no norms of queries and keys",
        what_to_do="leave it out, or set model.qk_layernorm=true",
        unless=_any_model_part("qk_layernorm"),
        depends_on=("model.qk_layernorm",),
    ),
    Rejection(
        "fp8_recipe",
        "the model computes nothing in fp8",
        what_to_do="leave it out: it follows from model.fp8 and model.fp8_recipe",
        unless=_any_model_part("fp8"),
        depends_on=("model.fp8", "model.fp8_recipe"),
    ),
    Rejection(
        "store_param_remainders",
        "is read by the precision-aware optimizer alone",
        what_to_do="leave it out, or set optimizer.use_precision_aware_optimizer=true",
        unless=_is("use_precision_aware_optimizer"),
        depends_on=("optimizer.use_precision_aware_optimizer",),
    ),
    _BARRIERS_OF_TIMERS,
)
"""Rejections of fields of the optimizer section."""

DDP = (
    _SHARED_MXFP8_BUFFER,
    Rejection(
        "use_megatron_fsdp use_custom_fsdp", "is not supported, as the loop uses the DDP wrapper"
    ),
    Rejection(
        "num_distributed_optimizer_instances",
        "is not supported, as the optimizer's state is sharded over all data-parallel ranks",
        what_to_do="set it to 1",
    ),
    Rejection(
        "average_in_collective",
        "would divide by the ranks what train.loss_normalization=token divides by the tokens",
        what_to_do="set it to false, or train.loss_normalization=microbatch",
        unless=lambda _, config: config.train.loss_normalization == "microbatch",
        depends_on=("train.loss_normalization",),
    ),
    Rejection(
        "nccl_ub",
        "needs NCCL, which dist.device=cpu does not have",
        what_to_do="set it to false",
        unless=_on_gpu,
        depends_on=("dist.device",),
    ),
    Rejection(
        "data_parallel_sharding_strategy outer_dp_sharding_strategy gradient_reduce_div_fusion "
        "suggested_communication_unit_size keep_fp8_transpose_cache fsdp_double_buffer "
        "fsdp_db_use_persist_buf_on_alloc_fail fsdp_all_gather_in_start_param_sync "
        "fsdp_manual_registration megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype "
        "megatron_fsdp_grad_comm_dtype megatron_fsdp_use_decoupled_grad "
        "megatron_fsdp_cuda_graph_mode megatron_fsdp_enable_fine_grained_param_gather "
        "megatron_fsdp_max_pool_double_buffer",
        _FSDP,
    ),
    Rejection(
        "fp8_param_gather",
        "the model's parameters are not fp8",
        what_to_do="leave it out: it follows from model.fp8_param",
        unless=_any_model_part("fp8_param"),
        depends_on=("model.fp8_param",),
    ),
    Rejection(
        "fp4_param_gather",
        "the model's parameters are not fp4",
        what_to_do="leave it out: it follows from model.fp4_param",
        unless=_any_model_part("fp4_param"),
        depends_on=("model.fp4_param",),
    ),
    Rejection(
        "delay_wgrad_compute",
        "the model does not delay its weight gradients",
        what_to_do="leave it out: it follows from model.delay_wgrad_compute",
        unless=_any_model_part("delay_wgrad_compute"),
        depends_on=("model.delay_wgrad_compute",),
    ),
    Rejection(
        "bucket_size num_buckets",
        "the gradients are one bucket without overlap",
        what_to_do="leave it out, or set ddp.overlap_grad_reduce=true",
        unless=_is("overlap_grad_reduce"),
        depends_on=("ddp.overlap_grad_reduce",),
    ),
    Rejection(
        "pad_buckets_for_high_nccl_busbw reduce_scatter_with_fp32_accumulation",
        "is done for the distributed optimizer alone",
        what_to_do="leave it out, or set ddp.use_distributed_optimizer=true",
        unless=_is("use_distributed_optimizer"),
        depends_on=("ddp.use_distributed_optimizer",),
    ),
    Rejection(
        "align_param_gather",
        "aligns the gathers that ddp.overlap_param_gather=true overlaps",
        what_to_do="leave it out, or set that",
        unless=_is("overlap_param_gather"),
        depends_on=("ddp.overlap_param_gather",),
    ),
    Rejection(
        "disable_symmetric_registration",
        "is read with ddp.nccl_ub=true alone",
        what_to_do="leave it out, or set that",
        unless=_is("nccl_ub"),
        depends_on=("ddp.nccl_ub",),
    ),
)
"""Rejections of fields of the ddp section."""

MODEL = (
    Rejection(
        "cuda_graph_impl enable_cuda_graph external_cuda_graph cuda_graph_modules "
        "cuda_graph_scope inference_cuda_graph_scope cuda_graph_use_single_mempool "
        "cuda_graph_retain_backward_graph cuda_graph_warmup_steps delay_offload_until_cuda_graph "
        "moe_pad_experts_for_cuda_graph_inference",
        _GRAPHS,
    ),
    Rejection(
        "use_te_rng_tracker inference_rng_tracker",
        "the loop seeds megatron-core's own random streams",
    ),
    Rejection(
        "qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit",
        "the loop does not look at the attention's largest logits after a step",
    ),
    Rejection(
        "hybrid_context_parallel max_seqlen_per_dp_cp_rank",
        "the data is not arranged for context-parallel groups of changing sizes",
        what_to_do="leave it out; model.context_parallel_size has one size",
        depends_on=("model.context_parallel_size",),
    ),
    Rejection(
        "hierarchical_context_parallel_sizes",
        "the loop makes one group for context parallelism, without levels",
    ),
    Rejection(
        "pipeline_model_parallel_comm_backend",
        "the loop makes the pipeline's groups over NCCL, or gloo on a CPU",
    ),
    Rejection(
        "gtp_weight_remat_size expert_gtp_weight_remat_size",
        "the loop makes no groups for generalized tensor parallelism",
    ),
    Rejection(
        "num_microbatches_with_partial_activation_checkpoints",
        "the forward step does not learn which microbatches to checkpoint",
        what_to_do="leave it out; model.recompute_granularity recomputes",
        depends_on=("model.recompute_granularity",),
    ),
    Rejection(
        "tp_comm_overlap",
        "is not supported: the loop sets up none of the buffers of Transformer Engine that it "
        "needs",
    ),
    Rejection("use_ring_exchange_p2p", "needs a torch with a kernel of its own"),
    Rejection(
        "tensor_parallel_num_weight_shards",
        "is not supported beyond the tensor-parallel size",
        unless=lambda section, _: (
            section.tensor_parallel_num_weight_shards == section.tensor_model_parallel_size
        ),
    ),
    Rejection(
        "expert_tensor_parallel_num_weight_shards",
        "is not supported beyond the experts' tensor-parallel size",
        unless=lambda section, _: (
            section.expert_tensor_parallel_num_weight_shards
            == (section.expert_tensor_parallel_size or section.tensor_model_parallel_size)
        ),
    ),
    Rejection(
        "tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs "
        "tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs "
        "tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 "
        "tp_comm_bootstrap_backend",
        "is part of model.tp_comm_overlap, which is not supported",
        depends_on=("model.tp_comm_overlap",),
    ),
    Rejection("batch_invariant_mode", "the loop does not put the batch-invariant kernels in place"),
    Rejection(
        "moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda "
        "moe_paged_stash_buffer_size_factor_cpu",
        "the loop does not size and empty the stash around each step",
    ),
    Rejection("perform_initialization", "the weights would be whatever the memory held"),
    Rejection(
        "config_logger_dir",
        "megatron-core cannot write the arguments of a model that holds process groups",
        what_to_do="leave it out; the run directory has the configuration",
    ),
    Rejection("init_model_with_meta_device", _FSDP),
    _BARRIERS_OF_TIMERS,
    Rejection(
        "enable_autocast",
        "torch's autocast of megatron-core's schedules is for GPUs",
        what_to_do="leave it out; mixed_precision.precision chooses the numbers",
        unless=_on_gpu,
        depends_on=("mixed_precision.precision",),
    ),
    Rejection(
        "use_cpu_initialization",
        "is for GPUs: the weights of a run on the CPU are there anyway",
        unless=_on_gpu,
    ),
    Rejection(
        "disable_bf16_reduced_precision_matmul",
        "is a switch of the GPU's bf16 matrix products",
        unless=lambda section, config: _on_gpu(section, config) and section.bf16,
    ),
    Rejection(
        "deterministic_mode",
        "the libraries read "
        + ", ".join(f"{name}={value}" for name, value in _DETERMINISTIC.items())
        + " from the environment, which has other values",
        what_to_do="export them before the start, or leave it out",
        unless=lambda _, config: (
            config.dist.device == "cpu"
            or all(os.environ.get(name) == value for name, value in _DETERMINISTIC.items())
        ),
    ),
    Rejection(
        "cross_entropy_loss_fusion",
        "the fused loss gives other gradients from run to run, and deterministic_mode is on",
        what_to_do="leave out the one or the other",
        unless=lambda section, _: not section.deterministic_mode,
    ),
    Rejection("mup_width_mult", "follows from hidden_size and mup_base_hidden_size"),
    Rejection(
        "mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim "
        "mup_attn_scale_power",
        "is part of muP, which is off",
        what_to_do="leave it out, or set use_mup=true too",
        unless=_is("use_mup"),
    ),
)
"""Rejections of fields of any model's transformers."""
