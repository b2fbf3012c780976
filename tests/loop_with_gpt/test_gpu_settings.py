"""Settings that act on a GPU alone, each in a run of a tiny GPT with another value.

tools/settings_gpu.py runs it and prints what changes.
"""

import collections
import importlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.config import ConfigContainer, ConfigError, apply_overrides
from bridge.training.gpt_step import forward_step
from campaigns import hand_back, options_of
from gpt_models import tiny_gpt
from settings_trials import EXPERTS
from training_runs import TokenData, a_run, gpt_run, one_step

ASKED = options_of("settings_gpu")
"""The options of tools/settings_gpu.py; None in the suite."""
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
STEPS = 6
MOE = (*EXPERTS, "model.moe_ffn_hidden_size=64")
FP8 = ("model.fp8=hybrid",)
PRECISION_AWARE = ("optimizer.use_precision_aware_optimizer=true",)
OFFLOAD = ("model.cpu_offloading=true", "model.cpu_offloading_num_layers=1")
FINE = ("model.fine_grained_activation_offloading=true", "model.min_offloaded_tensor_size=1")
TRIALS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("model.layer_spec=local", (), ()),
    ("model.attention_backend=flash", (), ()),
    ("model.attention_backend=fused", (), ()),
    ("model.attention_backend=unfused", (), ()),
    ("model.softmax_type=off-by-one", (), ()),
    ("model.softmax_type=learnable", (), ()),
    ("model.cross_entropy_loss_fusion=false", (), ()),
    ("model.cross_entropy_fusion_impl=te", (), ()),
    ("model.apply_rope_fusion=false", (), ()),
    ("model.fused_single_qkv_rope=true", (), ()),
    ("model.fused_residual_rmsnorm=true", (), ()),
    ("model.use_transformer_engine_op_fuser=true", (), ()),
    ("model.use_te_activation_func=true", ("model.bias_activation_fusion=false",), ()),
    ("model.bias_activation_fusion=false", (), ()),
    ("model.bias_dropout_fusion=false", ("model.hidden_dropout=0.1",), ()),
    ("model.gradient_accumulation_fusion=false", (), ()),
    ("model.enable_autocast=true", (), ()),
    ("model.autocast_dtype=float16", ("model.enable_autocast=true",), ()),
    ("model.use_cpu_initialization=true", (), ()),
    ("model.disable_bf16_reduced_precision_matmul=true", (), ()),
    ("model.fp8=hybrid", (), ()),
    ("model.fp8=e4m3", (), ()),
    ("model.fp8_recipe=tensorwise", FP8, ()),
    ("model.fp8_recipe=blockwise", FP8, ()),
    ("model.fp8_recipe=mxfp8", FP8, ()),
    ("model.fp8_param=true", FP8, ()),
    ("model.fp8_param=true", (*FP8, "model.fp8_recipe=tensorwise"), ()),
    ("model.fp8_margin=4", FP8, ()),
    ("model.fp8_interval=2", FP8, ()),
    ("model.fp8_amax_history_len=4", FP8, ()),
    ("model.fp8_amax_compute_algo=max", (*FP8, "model.fp8_amax_history_len=4"), ()),
    ("model.fp8_wgrad=false", FP8, ()),
    ("model.fp8_dot_product_attention=true", FP8, ()),
    ("model.fp8_multi_head_attention=true", FP8, ()),
    ("model.tp_only_amax_red=true", FP8, ()),
    ("model.first_last_layers_bf16=true", (*FP8, "model.fp8_recipe=tensorwise"), ()),
    ("model.disable_parameter_transpose_cache=true", FP8, ()),
    ("model.fp4=e2m1", (), ()),
    ("model.cpu_offloading=true", (), ("model.cpu_offloading_num_layers=1",)),
    ("model.cpu_offloading_weights=true", OFFLOAD, ()),
    ("model.cpu_offloading_double_buffering=true", OFFLOAD, ()),
    ("model.cpu_offloading_retain_pinned_cpu_buffers=true", OFFLOAD, ()),
    ("model.offload_modules=[core_attn]", (), FINE),
    ("model.activation_offload_fraction=0.5", (*FINE, "model.offload_modules=[core_attn]"), ()),
    (
        "model.fine_grained_offloading_max_inflight_offloads=0",
        (*FINE, "model.offload_modules=[core_attn]"),
        (),
    ),
    ("model.moe_grouped_gemm=false", MOE, ()),
    ("model.moe_permute_fusion=false", MOE, ()),
    ("model.moe_router_fusion=true", MOE, ()),
    ("model.moe_latent_size=64", MOE, ()),
    ("model.moe_single_grouped_weight=true", MOE, ()),
    ("model.moe_single_grouped_bias=true", MOE, ()),
    ("model.moe_router_padding_for_quantization=true", (*MOE, *FP8), ()),
    (
        "model.use_fused_weighted_squared_relu=true",
        (
            *MOE,
            "model.activation_func=squared_relu",
            "model.gated_linear_unit=false",
            "model.bias_activation_fusion=false",
        ),
        (),
    ),
    (
        "model.use_grouped_gemm_for_shared_expert=true",
        (*MOE, "model.moe_shared_expert_intermediate_size=64"),
        (),
    ),
    ("model.recompute_modules=[layernorm]", ("model.recompute_granularity=selective",), ()),
    ("model.activation_func_fp8_input_store=true", (), ()),
    ("model.delay_wgrad_compute=true", (), ()),
    ("model.overlap_dispatch_backward_with_experts_wgrad=true", MOE, ()),
    ("optimizer.use_precision_aware_optimizer=true", (), ()),
    ("optimizer.store_param_remainders=false", PRECISION_AWARE, ()),
    ("optimizer.main_grads_dtype=bfloat16", PRECISION_AWARE, ("ddp.grad_reduce_in_fp32=false",)),
    ("optimizer.main_params_dtype=float16", PRECISION_AWARE, ()),
    ("optimizer.exp_avg_dtype=bfloat16", PRECISION_AWARE, ()),
    ("optimizer.exp_avg_sq_dtype=bfloat16", PRECISION_AWARE, ()),
    ("ddp.nccl_ub=true", (), ()),
    ("ddp.disable_symmetric_registration=true", ("ddp.nccl_ub=true",), ()),
)


def observed(overrides: tuple[str, ...], directory: str) -> dict[str, Any]:
    """Run and return everything to compare."""
    model = tiny_gpt(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=256,
        kv_channels=64,
        layer_spec="auto",
        pipeline_dtype=None,
    )
    config = gpt_run(directory, model, dataset=TokenData(train=4))
    config.train.train_iters = STEPS
    config.ddp = ConfigContainer(model=config.model, dataset=config.dataset).ddp
    config.optimizer.clip_grad = 1.0
    config = apply_overrides(config, overrides)
    torch.cuda.reset_peak_memory_stats()
    kernels: collections.Counter[str] = collections.Counter()
    with a_run(config, forward_step) as run:
        data, losses = run.parts.data.training(0), []
        for step in range(STEPS):
            if step == STEPS - 1:
                with torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CUDA]
                ) as seen:
                    result = one_step(run, data_iterator=data, reducer=run.parts.reducer)
                    torch.cuda.synchronize()
                kernels.update({e.key: e.count for e in seen.key_averages()})
            else:
                result = one_step(run, data_iterator=data, reducer=run.parts.reducer)
            losses.append(result.metrics["lm loss"])
    return {
        "losses": losses,
        "kernels": sorted(kernels.items()),
        "peak": torch.cuda.max_memory_allocated(),
    }


@pytest.fixture(scope="module")
def observed_without(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return the run with the other settings alone, run on first use."""

    @cache
    def of(base: tuple[str, ...]) -> dict[str, Any]:
        return observed(base, str(tmp_path_factory.mktemp("before")))

    return of


@pytest.mark.skipif(ASKED is None, reason="run by tools/settings_gpu.py")
@pytest.mark.parametrize(
    ("setting", "base", "also"),
    [trial for trial in TRIALS if re.search("" if ASKED is None else ASKED["pattern"], trial[0])],
)
def test_a_setting_has_an_effect_or_is_rejected(
    setting: str,
    base: tuple[str, ...],
    also: tuple[str, ...],
    observed_without: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    result = "FAILS"
    try:
        before, after = observed_without(base), observed((*base, *also, setting), str(tmp_path))
        changed = [name for name in before if before[name] != after[name]]
        ends = [round(run["losses"][-1], 4) for run in (before, after)]
        result = f"{', '.join(changed) or 'NOTHING'} (last loss {ends[0]} -> {ends[1]})"
    except ConfigError as error:
        result = f"REJECTED {'; '.join(error.problems)}"
    except Exception as error:
        result = f"FAILS {type(error).__name__}: {error}"[:400]
        # An exception in a step leaves Transformer Engine's autocast switched on.
        quantization = importlib.import_module("transformer_engine.pytorch.quantization")
        quantization.FP8GlobalStateManager.reset()
        raise
    finally:
        hand_back(setting=setting, base=base, result=result)
