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


def _experts(section: TransformerConfig, _: ConfigContainer) -> bool:
    return section.num_moe_experts is not None


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


_NO_FP8 = "is part of fp8 or fp4, which are off"
_UNREAD = "megatron-core 0.19 reads it nowhere"


def _needs(what: str) -> str:
    return f"leave it out, or set {what} too"


def _only_with(setting: str, fields: str, why: str | None = None) -> Rejection:
    """Reject fields that have an effect only with another one, which is off.

    Args:
        setting: The other field, with the value to give it where that is not obvious.
        fields: As for `Rejection`.
        why: As for `Rejection`; that the fields are part of the other one if None.
    """
    switch = setting.partition("=")[0]
    return Rejection(
        fields,
        why or f"is part of {switch}, which is off",
        what_to_do=_needs(setting),
        unless=_set(switch),
    )


LAYERS = (
    Rejection(
        "flash_decode inference_sampling_seed symmetric_ar_type nccl_all_reduce_for_prefill "
        "use_inference_optimized_layers inference_fuse_tp_communication "
        "inference_disable_triton_nvls_kernels inference_grouped_gemm_backend "
        "inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type "
        "mlp_chunks_for_prefill",
        "is for inference, and the loop trains",
    ),
    Rejection(
        "dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq "
        "dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
        "dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation "
        "dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 "
        "linear_attention_freq linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim "
        "linear_num_key_heads linear_num_value_heads",
        "is part of experimental_attention_variant, which is not supported",
    ),
    Rejection(
        "is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads "
        "mamba_training_ssm_states_dtype use_mamba_mem_eff_path mtp_hybrid_override_pattern",
        "is about Mamba layers, and all layers are transformers",
    ),
    Rejection(
        "use_kitchen use_kitchen_attention kitchen_attention_backend",
        "the layers take nothing of the package nvidia-kitchen",
    ),
    Rejection("hetereogenous_dist_checkpoint", "all layers are of one kind"),
    Rejection("mrope_section", "is part of multimodal rotary positions, which are not supported"),
    Rejection("test_mode", "is for megatron-core's own tests"),
    Rejection("apply_residual_connection_post_layernorm moe_router_topk_limited_devices", _UNREAD),
    Rejection(
        "use_grouped_gemm_for_dense_mlp", "the layers have no grouped product outside of experts"
    ),
    Rejection("mtp_standalone", "follows from pipeline_model_parallel_layout"),
    Rejection(
        "moe_token_dropping",
        _UNREAD,
        what_to_do="leave it out; moe_expert_capacity_factor drops tokens",
    ),
    Rejection("moe_enable_routing_replay", "nothing records and replays the routing in a run"),
    Rejection("quant_recipe", "the layers take no recipe for single modules"),
    _only_with(
        "enable_autocast=true", "autocast_dtype", "is the type of enable_autocast, which is off"
    ),
    # --- Transformer Engine
    Rejection(
        "attention_backend flash_attention_version softmax_type use_transformer_engine_op_fuser "
        "fused_single_qkv_rope fused_residual_rmsnorm cp_comm_type fp8 fp4 use_te_activation_func "
        "cpu_offloading fine_grained_activation_offloading moe_latent_size moe_router_fusion "
        "use_grouped_gemm_for_shared_expert moe_single_grouped_weight moe_single_grouped_bias "
        "moe_grouped_gemm use_fused_weighted_squared_relu",
        "acts in Transformer Engine's modules, and the layers are local ones (layer_spec)",
        what_to_do="leave it out, or run it on a GPU with Transformer Engine",
        unless=_engine,
    ),
    _only_with(
        "moe_shared_expert_glu_interleave_size",
        "use_grouped_gemm_for_shared_expert",
        "megatron-core builds it for interleaved gated weights alone",
    ),
    Rejection(
        "cross_entropy_fusion_impl",
        "is Transformer Engine's loss, and the layers are local ones (layer_spec)",
        what_to_do="leave it out, or run it on a GPU with Transformer Engine",
        unless=_engine,
    ),
    _only_with(
        "cross_entropy_loss_fusion=true",
        "cross_entropy_fusion_impl",
        "is a way of fusing the loss, which is off",
    ),
    Rejection(
        "persist_layer_norm memory_efficient_layer_norm masked_softmax_fusion "
        "attention_softmax_in_fp32 apply_query_key_layer_scaling",
        "acts in megatron-core's own norm and attention, which the layers are not made of",
    ),
    Rejection(
        "fp8_recipe",
        "needs a card of compute capability 10.0 (Blackwell)",
        what_to_do="give tensorwise, delayed or blockwise",
        unless=_no_format_of_blackwell("fp8_recipe", "mxfp8"),
    ),
    Rejection(
        "fp4",
        "needs a card of compute capability 10.0 (Blackwell)",
        what_to_do="leave it out, or set fp8=hybrid in its place",
        unless=_no_format_of_blackwell("fp4", "e2m1"),
    ),
    _only_with(
        "fp8=hybrid",
        "fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len "
        "fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_dot_product_attention "
        "fp8_multi_head_attention tp_only_amax_red",
    ),
    _only_with("fp4=e2m1", "fp4_recipe fp4_param fp4_quantizer_factory"),
    Rejection(
        "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 "
        "disable_parameter_transpose_cache",
        _NO_FP8,
        what_to_do=_needs("fp8=hybrid"),
        unless=_set("fp8", "fp4"),
    ),
    Rejection(
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
        "is read with first_last_layers_bf16=true alone",
        what_to_do=_needs("that"),
        unless=_set("first_last_layers_bf16"),
    ),
    _only_with(
        "cpu_offloading=true",
        "cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights "
        "cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers",
    ),
    _only_with(
        "fine_grained_activation_offloading=true",
        "offload_modules min_offloaded_tensor_size delta_offload_bytes_across_pp_ranks "
        "activation_offload_fraction fine_grained_offloading_max_inflight_offloads",
    ),
    _only_with(
        "bias_activation_fusion=true",
        "activation_func_fp8_input_store",
        "is read by the fused activation, which is off",
    ),
    # --- the layers
    Rejection(
        "fp32_residual_connection",
        "is so without it in float32",
        unless=lambda _, config: config.mixed_precision.precision != "fp32",
    ),
    _only_with(
        "window_size", "window_attn_skip_freq", "is about sliding windows, and there is none"
    ),
    _only_with(
        "recompute_granularity",
        "recompute_method recompute_num_layers recompute_modules distribute_saved_activations",
        "is part of recomputation, which is off",
    ),
    Rejection(
        "recompute_method recompute_num_layers",
        "is for recompute_granularity=full",
        what_to_do="leave it out, or set that",
        unless=lambda section, _: section.recompute_granularity == "full",
    ),
    Rejection(
        "recompute_modules",
        "is for recompute_granularity=selective",
        what_to_do="leave it out, or set that",
        unless=lambda section, _: section.recompute_granularity == "selective",
    ),
    Rejection(
        "distribute_saved_activations",
        "distributes over tensor-parallel ranks, and there is one",
        what_to_do="leave it out, or set tensor_model_parallel_size above 1",
        unless=lambda section, _: section.tensor_model_parallel_size > 1,
    ),
    _only_with(
        "mtp_num_layers",
        "mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads",
        "is about multi-token prediction, and the model has none",
    ),
    Rejection(
        "bias_dropout_fusion",
        "is a fused kernel of GPUs",
        unless=lambda _, config: config.dist.device == "cuda",
    ),
    # --- the pipeline
    Rejection(
        "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
        "pipeline_model_parallel_layout account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split",
        "divides the layers over a pipeline, and there is none",
        what_to_do="leave it out, or set pipeline_model_parallel_size above 1",
        unless=lambda section, _: section.pipeline_model_parallel_size > 1,
    ),
    Rejection(
        "microbatch_group_size_per_vp_stage",
        "is about an interleaved pipeline, and there is none",
        what_to_do=_needs("virtual_pipeline_model_parallel_size"),
        unless=lambda section, _: (section.virtual_pipeline_model_parallel_size or 1) > 1,
    ),
    _only_with("defer_embedding_wgrad_compute=true", "wgrad_deferral_limit"),
    _only_with(
        "sequence_parallel=true",
        "clone_scatter_output_in_embedding",
        "is about sequence parallelism, which is off",
    ),
    _only_with(
        "overlap_moe_expert_parallel_comm=true",
        "high_priority_a2a_comm_stream ep_overlap_early_attn_memory_release",
    ),
    # --- experts
    Rejection(
        "moe_token_dispatcher_type",
        "moves tokens to experts, and the model has none",
        what_to_do=_needs("num_moe_experts"),
        # Stages may only exchange samples of changing lengths with another than the default.
        unless=lambda section, config: _experts(section, config) or section.variable_seq_lengths,
    ),
    Rejection(
        "moe_token_dispatcher_type",
        "the flex dispatcher needs a GPU and the package deep_ep",
        what_to_do="take alltoall, or install it",
        unless=lambda section, config: (
            section.moe_token_dispatcher_type != "flex"
            or (config.dist.device == "cuda" and find_spec("deep_ep") is not None)
        ),
    ),
    Rejection(
        "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap "
        "use_grouped_gemm_for_shared_expert moe_shared_expert_glu_interleave_size moe_layer_freq "
        "moe_ffn_hidden_size moe_router_load_balancing_type moe_router_topk "
        "moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_num_groups "
        "moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor "
        "moe_router_score_function moe_router_dtype moe_router_enable_expert_bias "
        "moe_router_bias_update_rate moe_router_quantile_balancing_ema "
        "moe_router_force_load_balancing moe_router_force_biased moe_grouped_gemm "
        "moe_single_grouped_weight moe_single_grouped_bias moe_aux_loss_coeff moe_z_loss_coeff "
        "moe_input_jitter_eps moe_enable_deepep moe_flex_dispatcher_backend "
        "moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs "
        "moe_per_layer_logging moe_expert_capacity_factor moe_pad_expert_input_to_capacity "
        "moe_token_drop_policy moe_layer_recompute moe_permute_fusion moe_router_fusion "
        "moe_apply_probs_on_input moe_latent_size moe_flex_dispatcher_num_sms moe_deepep_num_sms "
        "moe_hybridep_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute "
        "moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape moe_ncclep_zero_copy "
        "moe_mlp_glu_interleave_size moe_expert_rank_capacity_factor "
        "overlap_dispatch_backward_with_experts_wgrad use_fused_weighted_squared_relu",
        "is about experts, and the model has none",
        what_to_do=_needs("num_moe_experts"),
        unless=_experts,
    ),
    _only_with(
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate moe_shared_expert_overlap",
        "is about shared experts, and there is none",
    ),
    Rejection(
        "moe_aux_loss_coeff",
        "the router balances without a loss (moe_router_load_balancing_type)",
        unless=_router_loss,
    ),
    Rejection(
        "moe_router_quantile_balancing_ema",
        "is part of moe_router_load_balancing_type=quantile_balancing",
        what_to_do=_needs("that"),
        unless=lambda section, _: section.moe_router_load_balancing_type == "quantile_balancing",
    ),
    _only_with(
        "moe_router_enable_expert_bias=true",
        "moe_router_bias_update_rate",
        "is about the experts' bias, and there is none",
    ),
    _only_with(
        "moe_expert_capacity_factor",
        "moe_pad_expert_input_to_capacity moe_token_drop_policy",
        "is about experts of limited capacity, and theirs has no limit",
    ),
    Rejection(
        "moe_flex_dispatcher_backend moe_enable_deepep moe_deepep_num_sms "
        "moe_flex_dispatcher_num_sms",
        "is part of moe_token_dispatcher_type=flex",
        what_to_do=_needs("that"),
        unless=_flex("deepep", "hybridep", "ncclep"),
    ),
    Rejection(
        "moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs "
        "moe_hybridep_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute "
        "moe_hybridep_num_sms_preprocessing",
        "is part of the flex dispatcher with moe_flex_dispatcher_backend=hybridep",
        what_to_do=_needs("those"),
        unless=_flex("hybridep"),
    ),
    Rejection(
        "moe_ncclep_static_shape moe_ncclep_zero_copy",
        "is part of the flex dispatcher with moe_flex_dispatcher_backend=ncclep",
        what_to_do=_needs("those"),
        unless=_flex("ncclep"),
    ),
    Rejection(
        "moe_router_padding_for_quantization moe_router_padding_for_fp8",
        _NO_FP8,
        what_to_do=_needs("fp8=hybrid"),
        unless=_set("fp8", "fp4"),
    ),
    Rejection(
        "moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size",
        "is part of Transformer Engine's fused products (use_transformer_engine_op_fuser)",
        what_to_do=_needs("that"),
        unless=lambda section, config: (
            _engine(section, config) and section.use_transformer_engine_op_fuser
        ),
    ),
)
"""Rejections of fields of our transformers."""
