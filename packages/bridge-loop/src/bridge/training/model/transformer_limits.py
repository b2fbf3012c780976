"""Fields of megatron-core's TransformerConfig that have no effect in our transformers.

They belong to modules that our layers are not made of, to inference, or to a feature that is off.
"""

from importlib.util import find_spec
from typing import Any

import torch

from bridge.training.config import ConfigContainer, TransformerConfig
from bridge.training.config.checks.unsupported import Condition, Rejection
from bridge.training.config.schema.to_plain import text_of


def _engine(section: Any, _: ConfigContainer) -> bool:
    return bool(section.layer_spec == "transformer_engine")


def _set(*names: str) -> Condition:
    return lambda section, _: any(getattr(section, name) not in (None, False, 0) for name in names)


def _engine_and(name: str) -> Condition:
    return lambda section, config: _engine(section, config) and bool(getattr(section, name))


def _experts(section: TransformerConfig, _: ConfigContainer) -> bool:
    return section.num_moe_experts is not None


def _pipeline(section: TransformerConfig, _: ConfigContainer) -> bool:
    return section.pipeline_model_parallel_size > 1


def _router_loss(section: TransformerConfig, _: ConfigContainer) -> bool:
    kinds = section.moe_router_load_balancing_type
    return bool({"none", "sinkhorn"}.isdisjoint([kinds] if isinstance(kinds, str) else kinds))


def _flex(*backends: str) -> Condition:
    def condition(section: TransformerConfig, _: ConfigContainer) -> bool:
        return (
            section.moe_token_dispatcher_type == "flex"
            and section.moe_flex_dispatcher_backend in backends
        )

    return condition


def _no_format_of_blackwell(name: str, *values: str) -> Condition:
    """Whether a field has no format of Blackwell cards, or the card is one."""

    def condition(section: Any, config: ConfigContainer) -> bool:
        if str(text_of(getattr(section, name))) not in values:
            return True
        return config.dist.device == "cuda" and torch.cuda.get_device_capability() >= (10, 0)

    return condition


_INFERENCE = "is for inference, and the loop trains"
_NO_ENGINE = "acts in Transformer Engine's modules, and the layers are local ones (layer_spec)"
_NO_EXPERTS = "is about experts, and the model has none"
_NO_MTP = "is about multi-token prediction, and the model has none"
_NO_FP8 = "is part of fp8 or fp4, which are off"
_UNREAD = "megatron-core 0.19 reads it nowhere"


def _needs(what: str) -> str:
    return f"leave it out, or set {what} too"


LAYERS = (
    Rejection(
        fields=(
            "flash_decode",
            "inference_sampling_seed",
            "symmetric_ar_type",
            "nccl_all_reduce_for_prefill",
            "use_inference_optimized_layers",
            "inference_fuse_tp_communication",
            "inference_disable_triton_nvls_kernels",
            "inference_grouped_gemm_backend",
            "inference_moe_disable_fused_quant_kernels",
            "inference_moe_token_dispatcher_type",
            "mlp_chunks_for_prefill",
        ),
        why=_INFERENCE,
    ),
    Rejection(
        fields=(
            "dsa_indexer_n_heads",
            "dsa_indexer_head_dim",
            "dsa_indexer_topk",
            "dsa_indexer_topk_freq",
            "dsa_indexer_skip_topk_offset",
            "dsa_indexer_loss_coeff",
            "dsa_indexer_use_sparse_loss",
            "dsa_kernel_backend",
            "dsa_indexer_rope_interleaved",
            "dsa_indexer_rotate_activation",
            "dsa_indexer_scoring_relu",
            "dsa_indexer_k_norm_epsilon",
            "dsa_indexer_k_norm_fp32",
            "linear_attention_freq",
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
        ),
        why="is part of experimental_attention_variant, which is not supported",
    ),
    Rejection(
        fields=(
            "is_hybrid_model",
            "mamba_state_dim",
            "mamba_head_dim",
            "mamba_num_groups",
            "mamba_num_heads",
            "mamba_training_ssm_states_dtype",
            "use_mamba_mem_eff_path",
            "mtp_hybrid_override_pattern",
        ),
        why="is about Mamba layers, and all layers are transformers",
    ),
    Rejection(
        fields=("use_kitchen", "use_kitchen_attention", "kitchen_attention_backend"),
        why="the layers take nothing of the package nvidia-kitchen",
    ),
    Rejection(
        fields=("hetereogenous_dist_checkpoint",),
        why="all layers are of one kind",
    ),
    Rejection(
        fields=("mrope_section",),
        why="is part of multimodal rotary positions, which are not supported",
    ),
    Rejection(fields=("test_mode",), why="is for megatron-core's own tests"),
    Rejection(
        fields=("apply_residual_connection_post_layernorm", "moe_router_topk_limited_devices"),
        why=_UNREAD,
    ),
    Rejection(
        fields=("use_grouped_gemm_for_dense_mlp",),
        why="the layers have no grouped product outside of experts",
    ),
    Rejection(
        fields=("mtp_standalone",),
        why="follows from pipeline_model_parallel_layout",
    ),
    Rejection(
        fields=("moe_token_dropping",),
        why=_UNREAD,
        what_to_do="leave it out; moe_expert_capacity_factor drops tokens",
    ),
    Rejection(
        fields=("moe_enable_routing_replay",),
        why="nothing records and replays the routing in a run",
    ),
    Rejection(
        fields=("quant_recipe",),
        why="the layers take no recipe for single modules",
    ),
    Rejection(
        fields=("autocast_dtype",),
        why="is the type of enable_autocast, which is off",
        what_to_do=_needs("enable_autocast=true"),
        unless=_set("enable_autocast"),
    ),
    # --- Transformer Engine
    Rejection(
        fields=(
            "attention_backend",
            "flash_attention_version",
            "softmax_type",
            "use_transformer_engine_op_fuser",
            "fused_single_qkv_rope",
            "fused_residual_rmsnorm",
            "cp_comm_type",
            "fp8",
            "fp4",
            "use_te_activation_func",
            "cpu_offloading",
            "fine_grained_activation_offloading",
            "moe_latent_size",
            "moe_router_fusion",
            "use_grouped_gemm_for_shared_expert",
            "moe_single_grouped_weight",
            "moe_single_grouped_bias",
            "moe_grouped_gemm",
            "use_fused_weighted_squared_relu",
        ),
        why=_NO_ENGINE,
        what_to_do="leave it out, or run it on a GPU with Transformer Engine",
        unless=_engine,
    ),
    Rejection(
        fields=("use_grouped_gemm_for_shared_expert",),
        why="megatron-core builds it for interleaved gated weights alone",
        what_to_do="leave it out, or set moe_shared_expert_glu_interleave_size too",
        unless=_set("moe_shared_expert_glu_interleave_size"),
    ),
    Rejection(
        fields=("cross_entropy_fusion_impl",),
        why="is Transformer Engine's loss, and the layers are local ones (layer_spec)",
        what_to_do="leave it out, or run it on a GPU with Transformer Engine",
        unless=_engine,
    ),
    Rejection(
        fields=("cross_entropy_fusion_impl",),
        why="is a way of fusing the loss, which is off",
        what_to_do=_needs("cross_entropy_loss_fusion=true"),
        unless=_set("cross_entropy_loss_fusion"),
    ),
    Rejection(
        fields=(
            "persist_layer_norm",
            "memory_efficient_layer_norm",
            "masked_softmax_fusion",
            "attention_softmax_in_fp32",
            "apply_query_key_layer_scaling",
        ),
        why="acts in megatron-core's own norm and attention, which the layers are not made of",
    ),
    Rejection(
        fields=("fp8_recipe",),
        why="needs a card of compute capability 10.0 (Blackwell)",
        what_to_do="give tensorwise, delayed or blockwise",
        unless=_no_format_of_blackwell("fp8_recipe", "mxfp8"),
    ),
    Rejection(
        fields=("fp4",),
        why="needs a card of compute capability 10.0 (Blackwell)",
        what_to_do="leave it out, or set fp8=hybrid in its place",
        unless=_no_format_of_blackwell("fp4", "e2m1"),
    ),
    Rejection(
        fields=(
            "fp8_recipe",
            "fp8_param",
            "fp8_quantizer_factory",
            "fp8_margin",
            "fp8_interval",
            "fp8_amax_history_len",
            "fp8_amax_compute_algo",
            "fp8_wgrad",
            "fp8_output_proj",
            "fp8_dot_product_attention",
            "fp8_multi_head_attention",
            "tp_only_amax_red",
        ),
        why="is part of fp8, which is off",
        what_to_do=_needs("fp8=hybrid"),
        unless=_set("fp8"),
    ),
    Rejection(
        fields=("fp4_recipe", "fp4_param", "fp4_quantizer_factory"),
        why="is part of fp4, which is off",
        what_to_do=_needs("fp4=e2m1"),
        unless=_set("fp4"),
    ),
    Rejection(
        fields=(
            "first_last_layers_bf16",
            "num_layers_at_start_in_bf16",
            "num_layers_at_end_in_bf16",
            "disable_parameter_transpose_cache",
        ),
        why=_NO_FP8,
        what_to_do=_needs("fp8=hybrid"),
        unless=_set("fp8", "fp4"),
    ),
    Rejection(
        fields=("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        why="is read with first_last_layers_bf16=true alone",
        what_to_do=_needs("that"),
        unless=_set("first_last_layers_bf16"),
    ),
    Rejection(
        fields=(
            "cpu_offloading_num_layers",
            "cpu_offloading_activations",
            "cpu_offloading_weights",
            "cpu_offloading_double_buffering",
            "cpu_offloading_retain_pinned_cpu_buffers",
        ),
        why="is part of cpu_offloading, which is off",
        what_to_do=_needs("cpu_offloading=true"),
        unless=_set("cpu_offloading"),
    ),
    Rejection(
        fields=(
            "offload_modules",
            "min_offloaded_tensor_size",
            "delta_offload_bytes_across_pp_ranks",
            "activation_offload_fraction",
            "fine_grained_offloading_max_inflight_offloads",
        ),
        why="is part of fine_grained_activation_offloading, which is off",
        what_to_do=_needs("fine_grained_activation_offloading=true"),
        unless=_set("fine_grained_activation_offloading"),
    ),
    Rejection(
        fields=("activation_func_fp8_input_store",),
        why="is read by the fused activation, which is off",
        what_to_do=_needs("bias_activation_fusion=true"),
        unless=_set("bias_activation_fusion"),
    ),
    # --- the layers
    Rejection(
        fields=("fp32_residual_connection",),
        why="is so without it in float32",
        unless=lambda _, config: config.mixed_precision.precision != "fp32",
    ),
    Rejection(
        fields=("window_attn_skip_freq",),
        why="is about sliding windows, and there is none",
        what_to_do=_needs("window_size"),
        unless=_set("window_size"),
    ),
    Rejection(
        fields=(
            "recompute_method",
            "recompute_num_layers",
            "recompute_modules",
            "distribute_saved_activations",
        ),
        why="is part of recomputation, which is off",
        what_to_do=_needs("recompute_granularity"),
        unless=_set("recompute_granularity"),
    ),
    Rejection(
        fields=("recompute_method", "recompute_num_layers"),
        why="is for recompute_granularity=full",
        what_to_do="leave it out, or set that",
        unless=lambda section, _: section.recompute_granularity == "full",
    ),
    Rejection(
        fields=("recompute_modules",),
        why="is for recompute_granularity=selective",
        what_to_do="leave it out, or set that",
        unless=lambda section, _: section.recompute_granularity == "selective",
    ),
    Rejection(
        fields=("distribute_saved_activations",),
        why="distributes over tensor-parallel ranks, and there is one",
        what_to_do="leave it out, or set tensor_model_parallel_size above 1",
        unless=lambda section, _: section.tensor_model_parallel_size > 1,
    ),
    Rejection(
        fields=("mtp_loss_scaling_factor", "mtp_use_repeated_layer", "mtp_detach_heads"),
        why=_NO_MTP,
        what_to_do=_needs("mtp_num_layers"),
        unless=_set("mtp_num_layers"),
    ),
    Rejection(
        fields=("bias_dropout_fusion",),
        why="is a fused kernel of GPUs",
        unless=lambda _, config: config.dist.device == "cuda",
    ),
    # --- the pipeline
    Rejection(
        fields=(
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "pipeline_model_parallel_layout",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
        ),
        why="divides the layers over a pipeline, and there is none",
        what_to_do="leave it out, or set pipeline_model_parallel_size above 1",
        unless=_pipeline,
    ),
    Rejection(
        fields=("microbatch_group_size_per_vp_stage",),
        why="is about an interleaved pipeline, and there is none",
        what_to_do=_needs("virtual_pipeline_model_parallel_size"),
        unless=lambda section, _: (section.virtual_pipeline_model_parallel_size or 1) > 1,
    ),
    Rejection(
        fields=("wgrad_deferral_limit",),
        why="is part of defer_embedding_wgrad_compute, which is off",
        what_to_do=_needs("defer_embedding_wgrad_compute=true"),
        unless=_set("defer_embedding_wgrad_compute"),
    ),
    Rejection(
        fields=("clone_scatter_output_in_embedding",),
        why="is about sequence parallelism, which is off",
        what_to_do=_needs("sequence_parallel=true"),
        unless=_set("sequence_parallel"),
    ),
    Rejection(
        fields=("high_priority_a2a_comm_stream", "ep_overlap_early_attn_memory_release"),
        why="is part of overlap_moe_expert_parallel_comm, which is off",
        what_to_do=_needs("overlap_moe_expert_parallel_comm=true"),
        unless=_set("overlap_moe_expert_parallel_comm"),
    ),
    # --- experts
    Rejection(
        fields=("moe_token_dispatcher_type",),
        why="moves tokens to experts, and the model has none",
        what_to_do=_needs("num_moe_experts"),
        # Stages may only exchange samples of changing lengths with another than the default.
        unless=lambda section, config: _experts(section, config) or section.variable_seq_lengths,
    ),
    Rejection(
        fields=("moe_token_dispatcher_type",),
        why="the flex dispatcher needs a GPU and the package deep_ep",
        what_to_do="take alltoall, or install it",
        unless=lambda section, config: (
            section.moe_token_dispatcher_type != "flex"
            or (config.dist.device == "cuda" and find_spec("deep_ep") is not None)
        ),
    ),
    Rejection(
        fields=(
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_shared_expert_overlap",
            "use_grouped_gemm_for_shared_expert",
            "moe_shared_expert_glu_interleave_size",
            "moe_layer_freq",
            "moe_ffn_hidden_size",
            "moe_router_load_balancing_type",
            "moe_router_topk",
            "moe_router_padding_for_quantization",
            "moe_router_padding_for_fp8",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_pre_softmax",
            "moe_router_topk_scaling_factor",
            "moe_router_score_function",
            "moe_router_dtype",
            "moe_router_enable_expert_bias",
            "moe_router_bias_update_rate",
            "moe_router_quantile_balancing_ema",
            "moe_router_force_load_balancing",
            "moe_router_force_biased",
            "moe_grouped_gemm",
            "moe_single_grouped_weight",
            "moe_single_grouped_bias",
            "moe_aux_loss_coeff",
            "moe_z_loss_coeff",
            "moe_input_jitter_eps",
            "moe_enable_deepep",
            "moe_flex_dispatcher_backend",
            "moe_permute_fusion_into_hybridep",
            "moe_hybridep_pad_uneven_dispatch_inputs",
            "moe_per_layer_logging",
            "moe_expert_capacity_factor",
            "moe_pad_expert_input_to_capacity",
            "moe_token_drop_policy",
            "moe_layer_recompute",
            "moe_permute_fusion",
            "moe_router_fusion",
            "moe_apply_probs_on_input",
            "moe_latent_size",
            "moe_flex_dispatcher_num_sms",
            "moe_deepep_num_sms",
            "moe_hybridep_num_sms",
            "moe_hybridep_num_blocks_permute",
            "moe_hybridep_num_blocks_unpermute",
            "moe_hybridep_num_sms_preprocessing",
            "moe_ncclep_static_shape",
            "moe_ncclep_zero_copy",
            "moe_mlp_glu_interleave_size",
            "moe_expert_rank_capacity_factor",
            "overlap_dispatch_backward_with_experts_wgrad",
            "use_fused_weighted_squared_relu",
        ),
        why=_NO_EXPERTS,
        what_to_do=_needs("num_moe_experts"),
        unless=_experts,
    ),
    Rejection(
        fields=("moe_shared_expert_gate", "moe_shared_expert_overlap"),
        why="is about shared experts, and there is none",
        what_to_do=_needs("moe_shared_expert_intermediate_size"),
        unless=_set("moe_shared_expert_intermediate_size"),
    ),
    Rejection(
        fields=("moe_aux_loss_coeff",),
        why="the router balances without a loss (moe_router_load_balancing_type)",
        unless=_router_loss,
    ),
    Rejection(
        fields=("moe_router_quantile_balancing_ema",),
        why="is part of moe_router_load_balancing_type=quantile_balancing",
        what_to_do=_needs("that"),
        unless=lambda section, _: section.moe_router_load_balancing_type == "quantile_balancing",
    ),
    Rejection(
        fields=("moe_router_bias_update_rate",),
        why="is about the experts' bias, and there is none",
        what_to_do=_needs("moe_router_enable_expert_bias=true"),
        unless=_set("moe_router_enable_expert_bias"),
    ),
    Rejection(
        fields=("moe_pad_expert_input_to_capacity", "moe_token_drop_policy"),
        why="is about experts of limited capacity, and theirs has no limit",
        what_to_do=_needs("moe_expert_capacity_factor"),
        unless=_set("moe_expert_capacity_factor"),
    ),
    Rejection(
        fields=(
            "moe_flex_dispatcher_backend",
            "moe_enable_deepep",
            "moe_deepep_num_sms",
            "moe_flex_dispatcher_num_sms",
        ),
        why="is part of moe_token_dispatcher_type=flex",
        what_to_do=_needs("that"),
        unless=_flex("deepep", "hybridep", "ncclep"),
    ),
    Rejection(
        fields=(
            "moe_permute_fusion_into_hybridep",
            "moe_hybridep_pad_uneven_dispatch_inputs",
            "moe_hybridep_num_sms",
            "moe_hybridep_num_blocks_permute",
            "moe_hybridep_num_blocks_unpermute",
            "moe_hybridep_num_sms_preprocessing",
        ),
        why="is part of the flex dispatcher with moe_flex_dispatcher_backend=hybridep",
        what_to_do=_needs("those"),
        unless=_flex("hybridep"),
    ),
    Rejection(
        fields=("moe_ncclep_static_shape", "moe_ncclep_zero_copy"),
        why="is part of the flex dispatcher with moe_flex_dispatcher_backend=ncclep",
        what_to_do=_needs("those"),
        unless=_flex("ncclep"),
    ),
    Rejection(
        fields=(
            "moe_router_padding_for_quantization",
            "moe_router_padding_for_fp8",
        ),
        why=_NO_FP8,
        what_to_do=_needs("fp8=hybrid"),
        unless=_set("fp8", "fp4"),
    ),
    Rejection(
        fields=("moe_shared_expert_glu_interleave_size", "moe_mlp_glu_interleave_size"),
        why="is part of Transformer Engine's fused products (use_transformer_engine_op_fuser)",
        what_to_do=_needs("that"),
        unless=_engine_and("use_transformer_engine_op_fuser"),
    ),
)
"""Rejections of fields of our transformers."""
