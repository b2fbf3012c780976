"""Trials of megatron-core's settings: another value, and a run in which it can have an effect."""

import enum
import types
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin

import torch

from bridge.training.config import TransformerConfig
from bridge.training.config.schema.fields import annotations_of, fields_of, is_runtime_hook
from bridge.training.config.schema.to_plain import text_of

NO_OVERLAP = ("ddp.overlap_param_gather=false",)
PLAIN_OPTIMIZER = (*NO_OVERLAP, "ddp.use_distributed_optimizer=false")
EXPERTS = (
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.moe_ffn_hidden_size=32",
    "model.moe_token_dispatcher_type=alltoall",
    "model.moe_aux_loss_coeff=0.01",
    "model.moe_z_loss_coeff=0.001",
)
STAGES = ("model.pipeline_model_parallel_size=2", "model.num_layers=4")
INTERLEAVED = (*STAGES, "model.virtual_pipeline_model_parallel_size=2")
RECOMPUTED = (
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
)
BIAS = (*EXPERTS, "model.moe_router_score_function=sigmoid")
CAPACITY = (*EXPERTS, "model.moe_expert_capacity_factor=0.5")
SHARED = (*EXPERTS, "model.moe_shared_expert_intermediate_size=32")
MUP = ("model.use_mup=true", "model.mup_base_hidden_size=16")
SGD = ("optimizer.optimizer=sgd", *PLAIN_OPTIMIZER)
MUON = ("optimizer.optimizer=muon", *PLAIN_OPTIMIZER)
MTP = ("model.mtp_num_layers=2",)
SQUARED = (*EXPERTS, "model.activation_func=squared_relu", "model.gated_linear_unit=false")


@dataclass(frozen=True)
class Trial:
    """Another value of a field, and the run in which it is tried."""

    value: str
    base: tuple[str, ...] = ()
    """Overrides of the run with the value and of the one that it is compared with."""
    also: tuple[str, ...] = ()
    """Overrides of the run with the value alone."""
    ranks: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    is_multimodal: bool = False
    """Whether the run is of a multimodal model, not of a GPT."""


def audited_fields(section: str, holder: Any) -> list[str]:
    """Return megatron-core's fields of a section, and those of our own that have a trial."""
    own = set(fields_of(holder)) - set(fields_of(TransformerConfig)) if section == "model" else ()
    return [name for name in fields_of(holder) if name not in own or f"model.{name}" in TRIALS]


def trial_of(section: str, name: str, holder: Any) -> Trial | None:
    """Return the trial of a field; None where the loop fills it while it runs.

    Raises:
        LookupError: The field has no trial in `TRIALS` and needs one.
    """
    field = fields_of(holder)[name]
    if is_runtime_hook(field):
        return None
    found = TRIALS.get(f"{section}.{name}")
    annotation, present = annotations_of(type(holder))[name], getattr(holder, name)
    if found is None and (value := _another(annotation, present)):
        found = Trial(value)
    if found is None:
        raise LookupError(
            f"{section}.{name} is new: give it a trial in tests/support/settings_trials.py"
        )
    if section == "model" and name.startswith("moe_") and not found.base:
        found = replace(found, base=EXPERTS)
    if section == "ddp" and found.ranks == 1:
        found = replace(found, ranks=2, precision="bf16")
    return found


def _another(annotation: Any, present: Any) -> str | None:
    """Return another value than the present one, for the types where any will do."""
    union = get_origin(annotation) in (Union, types.UnionType)
    for kind in get_args(annotation) if union else (annotation,):
        choices: tuple[Any, ...] = ()
        if kind is bool:
            choices = (True, False)
        elif get_origin(kind) is Literal:
            choices = get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            choices = tuple(kind)
        elif kind is torch.dtype:
            choices = (torch.bfloat16, torch.float32)
        elif kind is int:
            choices = (2 * (present or 1),)
        elif kind is float:
            choices = (2 * (present or 0.25),)
        for choice in choices:
            if choice is not None and choice != present:
                return text_of(choice)
    return None


def _of(section: str, **trials: Trial | str) -> dict[str, Trial]:
    return {
        f"{section}.{name}": trial if isinstance(trial, Trial) else Trial(trial)
        for name, trial in trials.items()
    }


def _muon(value: str) -> Trial:
    return Trial(value, MUON)


TRIALS: dict[str, Trial] = (
    _of(
        "optimizer",
        optimizer=Trial("sgd", PLAIN_OPTIMIZER),
        decoupled_min_lr=Trial("0.009", ("optimizer.decoupled_lr=0.01",)),
        apply_wd_to_qk_layernorm=Trial("true", ("model.qk_layernorm=true",)),
        fp8_recipe="mxfp8",
        initial_loss_scale=Trial("65536", precision="fp16"),
        min_loss_scale=Trial("2", precision="fp16"),
        loss_scale_window=Trial("20", precision="fp16"),
        hysteresis=Trial("1", precision="fp16"),
        adam_beta1="0.5",
        adam_beta2="0.5",
        adam_eps="0.1",
        sgd_momentum=Trial("0.5", SGD),
        muon_momentum=_muon("0.5"),
        muon_split_qkv=_muon("false"),
        muon_nesterov=_muon("true"),
        muon_scale_mode=_muon("unit_rms_norm"),
        muon_fp32_matmul_prec=_muon("highest"),
        muon_coefficient_type=_muon("simple"),
        muon_num_ns_steps=_muon("4"),
        muon_tp_mode=Trial("duplicated", (*MUON, "model.tensor_model_parallel_size=2"), ranks=2),
        muon_extra_scale_factor=_muon("0.5"),
        muon_scalar_optimizer=_muon("lion"),
        lion_beta1=Trial("0.1", (*MUON, "optimizer.muon_scalar_optimizer=lion")),
        lion_beta2=Trial("0.1", (*MUON, "optimizer.muon_scalar_optimizer=lion")),
        adaptive_muon_moment2_method="normuon",
        use_distributed_optimizer="false",
        overlap_param_gather="false",
        clip_grad="0.1",
        grad_norm_skip_threshold="0.01",
        barrier_with_L1_time=Trial("true", ("logger.timing_log_level=1",)),
        config_logger_dir="DIRECTORY",
    )
    | _of(
        "ddp",
        overlap_grad_reduce=Trial("false", NO_OVERLAP),
        use_distributed_optimizer=Trial("false", NO_OVERLAP),
        num_distributed_optimizer_instances=Trial("2", ranks=2),
        bucket_size=Trial("1000", ranks=2),
        num_buckets=Trial("3", ranks=2),
        param_name_patterns_for_fp32_local_accumulation=Trial(
            "[all]", ("ddp.grad_reduce_in_fp32=false",)
        ),
        average_in_collective=Trial("true", ("train.loss_normalization=microbatch",)),
        data_parallel_sharding_strategy="optim",
        outer_dp_sharding_strategy="optim",
        suggested_communication_unit_size="1000",
        disable_symmetric_registration=Trial("true", ("ddp.nccl_ub=true",)),
    )
    | _of(
        "model",
        tensor_model_parallel_size=Trial("2", ranks=2),
        pipeline_model_parallel_size=Trial("2", ranks=2),
        virtual_pipeline_model_parallel_size=Trial("2", STAGES, ranks=2),
        sequence_parallel=Trial("true", ("model.tensor_model_parallel_size=2",), ranks=2),
        context_parallel_size=Trial("2", ranks=2),
        hierarchical_context_parallel_sizes="[1,1]",
        expert_model_parallel_size=Trial("2", EXPERTS, ranks=2),
        expert_tensor_parallel_size=Trial(
            "1",
            (*EXPERTS, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
            ranks=2,
        ),
        cross_entropy_fusion_impl=Trial("te", ("model.cross_entropy_loss_fusion=true",)),
        overlap_moe_expert_parallel_comm=Trial(
            "true",
            (*EXPERTS, "model.expert_model_parallel_size=2"),
            ranks=2,
            precision="bf16",
        ),
        variable_seq_lengths=Trial(
            "true", STAGES, also=("model.moe_token_dispatcher_type=alltoall",), ranks=2
        ),
        overlap_p2p_comm=Trial("false", INTERLEAVED, ranks=2),
        batch_p2p_comm=Trial("false", STAGES, ranks=2),
        batch_p2p_sync=Trial("false", STAGES, ranks=2),
        deallocate_pipeline_outputs=Trial("false", STAGES, ranks=2),
        defer_embedding_wgrad_compute=Trial("true", STAGES, ranks=2),
        overlap_p2p_comm_warmup_flush=Trial("true", INTERLEAVED, ranks=2),
        microbatch_group_size_per_vp_stage=Trial("4", INTERLEAVED, ranks=2),
        cpu_offloading=Trial("true", also=("model.cpu_offloading_num_layers=1",)),
        barrier_with_L1_time=Trial("false", ("logger.timing_log_level=1",)),
        num_layers="4",
        mtp_num_layers="1",
        mtp_loss_scaling_factor=Trial("0.5", MTP),
        mtp_use_repeated_layer=Trial("true", MTP),
        mtp_detach_heads=Trial("true", MTP),
        mtp_hybrid_override_pattern="M",
        num_layers_in_first_pipeline_stage=Trial("1", STAGES, ranks=2),
        num_layers_in_last_pipeline_stage=Trial("1", STAGES, ranks=2),
        pipeline_model_parallel_layout=Trial("Et|tttL", STAGES, ranks=2),
        account_for_embedding_in_pipeline_split=Trial(
            "true", STAGES, also=("model.num_layers=3",), ranks=2
        ),
        account_for_loss_in_pipeline_split=Trial(
            "true", STAGES, also=("model.num_layers=3",), ranks=2
        ),
        hidden_size="64",
        num_attention_heads="8",
        num_query_groups="1",
        kv_channels="16",
        ffn_hidden_size="64",
        softmax_scale="0.5",
        fp32_residual_connection=Trial("true", precision="bf16"),
        activation_func="gelu",
        gated_linear_unit="false",
        activation_func_fp8_input_store=Trial("true", ("model.bias_activation_fusion=true",)),
        window_size="[4,0]",
        window_attn_skip_freq=Trial("2", ("model.window_size=[4,0]",)),
        normalization="LayerNorm",
        no_rope_freq="2",
        init_method="torch.nn.init.xavier_uniform_",
        output_layer_init_method="torch.nn.init.xavier_uniform_",
        embedding_init_method="torch.nn.init.xavier_uniform_",
        mup_base_hidden_size=Trial("16", ("model.use_mup=true",)),
        mup_embedding_mult=Trial("2", MUP),
        mup_output_mult=Trial("2", MUP),
        mup_base_head_dim=Trial("4", MUP),
        mup_attn_scale_power=Trial("0.5", MUP),
        use_mup=Trial("true", also=("model.mup_base_hidden_size=16",)),
        bias_dropout_fusion=Trial("true", ("model.hidden_dropout=0.1",)),
        recompute_granularity="selective",
        recompute_method=Trial("block", RECOMPUTED),
        recompute_num_layers=Trial("2", RECOMPUTED),
        distribute_saved_activations=Trial(
            "true", (*RECOMPUTED, "model.tensor_model_parallel_size=2"), ranks=2
        ),
        recompute_modules=Trial("[mlp]", ("model.recompute_granularity=selective",)),
        fp8_quantizer_factory="torch.nn.Linear",
        fp4_quantizer_factory="torch.nn.Linear",
        moe_shared_expert_intermediate_size=Trial("32", EXPERTS),
        moe_shared_expert_gate=Trial("true", SHARED),
        moe_shared_expert_overlap=Trial("true", SHARED),
        use_grouped_gemm_for_shared_expert=Trial("true", SHARED),
        moe_shared_expert_glu_interleave_size=Trial("8", SHARED),
        moe_layer_freq="[0,1]",
        moe_router_load_balancing_type="seq_aux_loss",
        moe_router_topk="3",
        moe_router_topk_limited_devices="1",
        moe_router_num_groups=Trial("2", EXPERTS, also=("model.moe_router_group_topk=1",)),
        moe_router_group_topk=Trial("1", (*EXPERTS, "model.moe_router_num_groups=2")),
        moe_router_enable_expert_bias=Trial("true", BIAS),
        moe_router_bias_update_rate=Trial(
            "0.1", (*BIAS, "model.moe_router_enable_expert_bias=true")
        ),
        moe_router_quantile_balancing_ema=Trial(
            "0.5", (*EXPERTS, "model.moe_router_load_balancing_type=quantile_balancing")
        ),
        moe_router_dtype=Trial("fp64", EXPERTS),
        calculate_per_token_loss="false",
        cp_comm_type=Trial("a2a", ("model.context_parallel_size=2",), ranks=2),
        moe_token_dispatcher_type="allgather",
        moe_expert_capacity_factor="0.5",
        moe_pad_expert_input_to_capacity=Trial("true", CAPACITY),
        moe_token_drop_policy=Trial("position", CAPACITY),
        moe_apply_probs_on_input=Trial(
            "true", (*EXPERTS, "model.moe_router_topk=1", "model.moe_router_pre_softmax=true")
        ),
        moe_ffn_hidden_size="64",
        use_fused_weighted_squared_relu=Trial("true", SQUARED),
        num_moe_experts=Trial("2"),
        cuda_graph_modules="[attn]",
        cuda_graph_scope="full_iteration",
        offload_modules="[core_attn]",
        config_logger_dir="DIRECTORY",
        mrope_section="[1,1,2]",
        clone_scatter_output_in_embedding=Trial(
            "false",
            ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
            ranks=2,
        ),
        quant_recipe="{}",
        vocab_size="128",
        make_vocab_size_divisible_by="128",
        seq_length=Trial("32", ("model.position_embedding_type=learned_absolute",)),
        position_embedding_type="none",
        rotary_base="100",
        rotary_percent="0.5",
        rope_scaling_factor=Trial("2", ("model.rope_scaling=true",)),
        layer_spec="transformer_engine",
        rope_scaling="true",
        share_embeddings_and_output_weights="true",
    )
)
"""For fields whose default does not suggest another value, or that need other settings too."""
