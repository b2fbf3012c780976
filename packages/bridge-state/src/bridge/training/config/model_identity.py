"""Model identity: the fields of a model's section that its checkpoints depend on.

Each field has one of four kinds:

- identity: it decides which weights there are, and what is computed with them.
- extensible: it is part of the identity, but a fine-tuning may choose another value, such as longer
  samples.
- training: it decides how the weights are trained, such as the dropout. A fine-tuning chooses anew.
- execution: it decides how the model is computed and divided over ranks. Every start may choose.

`bridge.training.checkpoint.resume_rules` has the rules that use them.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from bridge.training.config.schema.fields import annotations_of, fields_of

type FieldKind = Literal["identity", "extensible", "training", "execution"]

_KIND = "field_kind"


def model_field(kind: FieldKind, **arguments: Any) -> Any:
    """Return a dataclass field of a model's section that has a kind.

    A field that is declared without one has the kind of megatron-core's field of that name; it is
    identity where there is none.

    Args:
        kind: The kind.
        arguments: Those of `dataclasses.field`.
    """
    return dataclasses.field(metadata={_KIND: kind}, **arguments)


def field_kinds(section: type) -> dict[str, FieldKind]:
    """Return the kinds of the fields of a model's section and of the dataclasses in it, by name.

    Fields that are not listed are identity.
    """
    kinds = dict(MEGATRON_FIELDS)
    for cls in _dataclasses_within(section, set()):
        kinds.update(
            (name, field.metadata[_KIND])
            for name, field in fields_of(cls).items()
            if _KIND in field.metadata
        )
    return kinds


def kind_at(path: str, kinds: Mapping[str, FieldKind]) -> FieldKind:
    """Return the kind of a value in a model's section, such as "encoders.vision.num_layers".

    A value within a field, such as an item of a mapping, has the field's kind.

    Args:
        path: The path within the section.
        kinds: The kinds of the section's fields (`field_kinds`).
    """
    found = (kinds.get(name, "identity") for name in path.split("."))
    return next((kind for kind in found if kind != "identity"), "identity")


def _dataclasses_within(annotation: Any, seen: set[type]) -> Iterator[type]:
    """Yield a dataclass and those of its fields' annotations."""
    if not isinstance(annotation, type) or not dataclasses.is_dataclass(annotation):
        for argument in get_args(annotation):
            yield from _dataclasses_within(argument, seen)
    elif annotation not in seen:
        seen.add(annotation)
        yield annotation
        for inner in annotations_of(annotation).values():
            yield from _dataclasses_within(inner, seen)


_IDENTITY = (
    # Sizes, norms, activations and attention.
    "num_layers hidden_size num_attention_heads softmax_scale softmax_type num_query_groups "
    "ffn_hidden_size kv_channels fp32_residual_connection "
    "apply_residual_connection_post_layernorm layernorm_epsilon layernorm_zero_centered_gamma "
    "add_bias_linear add_qkv_bias gated_linear_unit activation_func glu_linear_offset "
    "activation_func_clamp_value rotary_interleaved window_size window_attn_skip_freq "
    "normalization qk_layernorm qk_l2_norm attention_output_gate no_rope_freq "
    "apply_query_key_layer_scaling attention_softmax_in_fp32 "
    # Kinds of layers and of attention that our models do not have.
    "multi_latent_attention experimental_attention_variant dsa_indexer_n_heads "
    "dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset "
    "dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu "
    "dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 linear_attention_freq "
    "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
    "linear_num_value_heads mrope_section is_hybrid_model mamba_state_dim mamba_head_dim "
    "mamba_num_groups mamba_num_heads heterogeneous_block_specs "
    # Multi-token prediction and muP.
    "mtp_num_layers mtp_use_repeated_layer mtp_hybrid_override_pattern use_mup mup_width_mult "
    "mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim "
    "mup_attn_scale_power "
    # Mixtures of experts.
    "num_moe_experts moe_shared_expert_intermediate_size moe_shared_expert_gate "
    "moe_shared_expert_glu_interleave_size moe_layer_freq moe_ffn_hidden_size moe_router_topk "
    "moe_router_topk_limited_devices moe_router_num_groups moe_router_group_topk "
    "moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function "
    "moe_router_enable_expert_bias moe_single_grouped_weight moe_single_grouped_bias "
    "moe_apply_probs_on_input moe_latent_size moe_mlp_glu_interleave_size "
).split()
_TRAINING = (
    # Initial weights and random streams.
    "perform_initialization use_cpu_initialization use_te_rng_tracker init_method "
    "output_layer_init_method init_method_std embedding_init_method embedding_init_method_std "
    "inference_rng_tracker "
    # Routing and the losses of experts.
    "moe_router_load_balancing_type moe_router_bias_update_rate "
    "moe_router_quantile_balancing_ema moe_router_force_load_balancing moe_router_force_biased "
    "moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_token_dropping "
    "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy "
    "moe_expert_rank_capacity_factor "
    # Dropout, auxiliary losses, clipping.
    "mtp_loss_scaling_factor mtp_detach_heads hidden_dropout attention_dropout qk_clip "
    "qk_clip_alpha qk_clip_threshold dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
).split()
_EXECUTION = (
    # Kernels, and how layers are built of them.
    "gradient_accumulation_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl "
    "attention_backend flash_attention_version calculate_per_token_loss dsa_kernel_backend "
    "init_model_with_meta_device bias_activation_fusion masked_softmax_fusion persist_layer_norm "
    "memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion "
    "use_fused_weighted_squared_relu fused_single_qkv_rope fused_residual_rmsnorm "
    "use_transformer_engine_op_fuser clone_scatter_output_in_embedding "
    "disable_parameter_transpose_cache use_te_activation_func use_mamba_mem_eff_path "
    "hetereogenous_dist_checkpoint transformer_impl "
    # Parallel groups, the pipeline and communication.
    "tensor_model_parallel_size tensor_parallel_num_weight_shards gtp_weight_remat_size "
    "pipeline_model_parallel_comm_backend pipeline_model_parallel_size "
    "virtual_pipeline_model_parallel_size sequence_parallel context_parallel_size "
    "hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel "
    "expert_model_parallel_size expert_tensor_parallel_size "
    "expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size tp_comm_overlap "
    "tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs "
    "tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs "
    "tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 "
    "tp_comm_bootstrap_backend delay_wgrad_compute overlap_dispatch_backward_with_experts_wgrad "
    "variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p "
    "deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit "
    "overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage mtp_standalone "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "pipeline_model_parallel_layout account_for_embedding_in_pipeline_split "
    "account_for_loss_in_pipeline_split high_priority_a2a_comm_stream cp_comm_type "
    "symmetric_ar_type mlp_chunks_for_training "
    # Types of numbers.
    "fp16 bf16 params_dtype deterministic_mode enable_autocast autocast_dtype pipeline_dtype "
    "activation_func_fp8_input_store disable_bf16_reduced_precision_matmul fp8 fp8_recipe "
    "fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len "
    "fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_dot_product_attention "
    "fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16 "
    "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention "
    "kitchen_attention_backend fp4 fp4_recipe fp4_param fp4_quantizer_factory "
    "batch_invariant_mode mamba_training_ssm_states_dtype quant_recipe "
    # Dispatch of tokens to experts.
    "overlap_moe_expert_parallel_comm moe_shared_expert_overlap "
    "use_grouped_gemm_for_shared_expert moe_enable_routing_replay "
    "moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_dtype "
    "use_grouped_gemm_for_dense_mlp moe_grouped_gemm moe_token_dispatcher_type moe_enable_deepep "
    "moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep "
    "moe_hybridep_pad_uneven_dispatch_inputs moe_permute_fusion moe_router_fusion "
    "moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms "
    "moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute "
    "moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape moe_ncclep_zero_copy "
    # Recomputation and offloading.
    "num_microbatches_with_partial_activation_checkpoints ep_overlap_early_attn_memory_release "
    "cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights "
    "cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers "
    "recompute_granularity recompute_method recompute_num_layers distribute_saved_activations "
    "recompute_modules moe_layer_recompute fine_grained_activation_offloading offload_modules "
    "min_offloaded_tensor_size delta_offload_bytes_across_pp_ranks activation_offload_fraction "
    "moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda "
    "moe_paged_stash_buffer_size_factor_cpu fine_grained_offloading_max_inflight_offloads "
    # CUDA graphs.
    "enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph "
    "cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl cuda_graph_modules "
    "cuda_graph_scope delay_offload_until_cuda_graph "
    # Inference, timers, logs and tests.
    "barrier_with_L1_time log_max_attention_logit test_mode moe_per_layer_logging "
    "moe_pad_experts_for_cuda_graph_inference inference_cuda_graph_scope config_logger_dir "
    "flash_decode inference_sampling_seed nccl_all_reduce_for_prefill "
    "use_inference_optimized_layers inference_fuse_tp_communication "
    "inference_disable_triton_nvls_kernels inference_grouped_gemm_backend "
    "inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type "
    "mlp_chunks_for_prefill "
).split()

MEGATRON_FIELDS: dict[str, FieldKind] = {
    **dict.fromkeys(_IDENTITY, "identity"),
    **dict.fromkeys(_TRAINING, "training"),
    **dict.fromkeys(_EXECUTION, "execution"),
}
"""The kind of each field of megatron-core's TransformerConfig."""
