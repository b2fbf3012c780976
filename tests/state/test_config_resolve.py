import time
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig

from bridge.training.config import (
    ConfigContainer,
    ConfigError,
    DistributedDataParallelConfig,
    Layout,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
    configure,
    layout_of,
    resolve,
)
from tiny_configs import (
    EagerTransformer,
    OpenTransformer,
    TinyData,
    TinyModel,
    TinyTransformer,
    tiny_config,
)
from tiny_configs import with_values as changed


def problems_of(config: Any, *, device: Any = "cpu", world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve(config, device=device, world_size=world_size)
    return error.value.problems


# --- what is filled in


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("cpu", "auto", torch.float32),
        ("cuda", "auto", torch.bfloat16),
        ("cuda", "fp32", torch.float32),
        ("cuda", "fp16", torch.float16),
        ("cpu", "bf16", torch.bfloat16),
        ("cpu", "fp16", torch.float16),
    ],
)
def test_precision_reaches_the_model_and_the_optimizer(
    device: Any, precision: str, dtype: torch.dtype
) -> None:
    config = changed(tiny_config(), mixed_precision__precision=precision)
    resolved = resolve(config, device=device, world_size=1)
    assert resolved.dist.device == device
    for section in (resolved.model, resolved.optimizer):
        assert section.params_dtype == dtype  # type: ignore[union-attr]
        assert section.bf16 == (dtype == torch.bfloat16)  # type: ignore[union-attr]
        assert section.fp16 == (dtype == torch.float16)  # type: ignore[union-attr]
    assert resolved.model.pipeline_dtype == dtype  # type: ignore[attr-defined]


def test_stages_exchange_float32_where_the_residual_stream_is() -> None:
    config = tiny_config(model=TinyTransformer(fp32_residual_connection=True))
    resolved = resolve(config, device="cuda", world_size=1)
    assert resolved.model.pipeline_dtype == torch.float32  # type: ignore[attr-defined]


def test_the_optimizer_follows_the_data_parallel_wrapper() -> None:
    ddp = DistributedDataParallelConfig()
    resolved = resolve(tiny_config(ddp=ddp), device="cpu", world_size=1)
    assert not resolved.optimizer.use_distributed_optimizer
    assert resolve(tiny_config(), device="cpu", world_size=1).optimizer.use_distributed_optimizer


def test_the_loss_normalization_reaches_the_model() -> None:
    for mode in ("token", "microbatch"):
        config = changed(tiny_config(), train__loss_normalization=mode)
        model: Any = resolve(config, device="cpu", world_size=1).model
        assert model.calculate_per_token_loss == (mode == "token")


def test_interleaving_exchanges_tensors_one_by_one() -> None:
    model = TinyTransformer(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    resolved: Any = resolve(tiny_config(model=model), device="cpu", world_size=2).model
    assert resolved.overlap_p2p_comm
    assert not resolved.batch_p2p_comm


def test_resolution_changes_a_copy_and_does_nothing_the_second_time() -> None:
    config = tiny_config()
    before = config.copy()
    resolved = resolve(config, device="cuda", world_size=1)
    assert config == before
    assert resolve(resolved, device="cuda", world_size=1) == resolved
    assert resolved.model.num_query_groups is None  # type: ignore[attr-defined]


def test_a_resolved_config_follows_changes_in_it() -> None:
    resolved = resolve(tiny_config(), device="cuda", world_size=1)
    resolved.mixed_precision.precision = "fp32"
    model: Any = resolve(resolved, device="cpu", world_size=1).model
    assert not model.bf16


def test_megatrons_own_completion_runs_on_the_values_that_were_set_afterwards() -> None:
    config = tiny_config()
    config.optimizer.use_precision_aware_optimizer = False
    del config.optimizer.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    resolved = resolve(config, device="cpu", world_size=1)
    assert resolved.optimizer.use_precision_aware_optimizer_no_fp8_or_ds_fp8 is False


def test_models_of_every_kind_resolve() -> None:
    for model in (TinyModel(), EagerTransformer()):
        resolve(tiny_config(model=model), device="cuda", world_size=2)


def test_fields_that_a_model_leaves_open_are_filled_in_by_the_device() -> None:
    config = tiny_config(model=OpenTransformer())
    for device, layers, fused in (("cuda", "fast", True), ("cpu", "local", False)):
        model: Any = resolve(config, device=device, world_size=1).model  # type: ignore[arg-type]
        assert (model.layers, model.fused) == (layers, fused)


@pytest.mark.parametrize("as_yaml", [False, True])
def test_open_fields_are_filled_in_anew_on_another_device(as_yaml: bool) -> None:
    resolved = resolve(tiny_config(model=OpenTransformer()), device="cuda", world_size=1)
    saved = ConfigContainer.from_yaml(resolved.to_yaml()) if as_yaml else resolved
    model: Any = resolve(saved, device="cpu", world_size=1).model
    assert (model.layers, model.fused) == ("local", False)


@pytest.mark.parametrize("as_yaml", [False, True])
def test_an_open_field_that_the_user_decided_stays_so(as_yaml: bool) -> None:
    config = tiny_config(model=OpenTransformer(layers="local"))
    resolved = resolve(config, device="cuda", world_size=1)
    saved = ConfigContainer.from_yaml(resolved.to_yaml()) if as_yaml else resolved
    model: Any = resolve(saved, device="cuda", world_size=1).model
    assert (model.layers, model.fused) == ("local", False)
    given = configure(
        tiny_config(model=OpenTransformer()), ["model.fused=null"], device="cuda", world_size=1
    )
    assert given.model.fused is None  # type: ignore[attr-defined]


def test_a_large_model_on_many_ranks_is_checked_at_once() -> None:
    model = TinyTransformer(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        seq_length=8192,
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=4,
        context_parallel_size=2,
        sequence_parallel=True,
    )
    config = tiny_config(
        model=model,
        train=TrainConfig(train_iters=10, global_batch_size=128),
        dataset=TinyData(size=128),
    )
    start = time.perf_counter()
    resolve(config, device="cuda", world_size=32)
    assert time.perf_counter() - start < 1.0


# --- the layout


def test_the_layout_says_how_ranks_are_arranged() -> None:
    model = ModelParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        context_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    layout = layout_of(model, 32)
    assert layout == Layout(
        tensor=2,
        pipeline=2,
        virtual_pipeline=None,
        context=2,
        expert=4,
        expert_tensor=1,
        data=4,
        world_size=32,
    )
    assert layout.model_ranks == 8
    assert layout.expert_data == 4
    assert layout_of(TinyModel(), 6).data == 6


# --- rejected values


def test_everything_wrong_is_one_report() -> None:
    config = tiny_config()
    config.train.train_iters = "abc"  # type: ignore[assignment]
    config.train.trian_iters = 5  # type: ignore[attr-defined]
    config.optimzer = None  # type: ignore[attr-defined]
    config.model.hidden_size = 7  # type: ignore[attr-defined]
    config.model.bf16 = True  # type: ignore[attr-defined]
    config.dataset.size = 1  # type: ignore[attr-defined]
    config.ddp.bucket_size, config.ddp.num_buckets = 1, 1
    config.scheduler = 3  # type: ignore[assignment]
    problems = problems_of(config, world_size=3)
    for line in (
        "train.train_iters: expected an integer or null, got 'abc'",
        "train.trian_iters: unknown key; did you mean train.train_iters?",
        "optimzer: unknown key; did you mean optimizer?",
        "scheduler: expected SchedulerConfig, got 3",
        "ddp.bucket_size=1: cannot specify both ddp.num_buckets and ddp.bucket_size; change it or "
        "ddp.num_buckets=1",
        "dataset.size=1 is less than one global batch",
    ):
        assert line in problems
    assert any(line.startswith("model.bf16=true: contradicts") for line in problems)
    assert any(line.startswith("model.hidden_size=7") for line in problems)
    assert any(line.startswith("train.global_batch_size=8") for line in problems)
    assert len(problems) == 9


def transformer(**values: Any) -> Any:
    return tiny_config(model=TinyTransformer(**values))


@pytest.mark.parametrize(
    ("config", "world_size", "says"),
    [
        (tiny_config(train=TrainConfig()), 1, "exactly one of train.train_iters"),
        (
            tiny_config(train=TrainConfig(train_iters=1, epochs=2)),
            1,
            "got train.train_iters=1 and train.epochs=2",
        ),
        (tiny_config(train=TrainConfig(train_iters=0)), 1, "train.train_iters=0: must be positive"),
        (
            tiny_config(train=TrainConfig(train_samples=10, global_batch_size=8)),
            1,
            "train.train_samples=10: is not a multiple of train.global_batch_size=8; the nearest",
        ),
        (tiny_config(), 3, "train.micro_batch_size=2 times 3 data-parallel replicas"),
        (
            tiny_config(scheduler=SchedulerConfig(lr_warmup_fraction=0.1, lr_warmup_iters=1)),
            1,
            "excludes scheduler.lr_warmup_iters",
        ),
        (tiny_config(scheduler=SchedulerConfig(lr_warmup_fraction=1.0)), 1, "below 1"),
        (
            tiny_config(scheduler=SchedulerConfig(lr_warmup_iters=8)),
            1,
            "scheduler.lr_warmup_iters=8: must be below train.train_iters=8",
        ),
        (
            tiny_config(scheduler=SchedulerConfig(lr_warmup_iters=4, lr_decay_iters=3)),
            1,
            "must be below scheduler.lr_decay_iters=3",
        ),
        (
            tiny_config(scheduler=SchedulerConfig(lr_decay_style="WSD")),
            1,
            "needs scheduler.lr_wsd_decay_iters",
        ),
        (tiny_config(optimizer=OptimizerConfig()), 1, "optimizer.lr: has no value"),
        (
            tiny_config(scheduler=SchedulerConfig(start_weight_decay=0.3, end_weight_decay=0.1)),
            1,
            "scheduler.start_weight_decay=0.3: does not fit scheduler.end_weight_decay=0.1",
        ),
        (
            tiny_config(optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-3)),
            1,
            "optimizer.min_lr=0.001: is above optimizer.lr=0.0001",
        ),
        (changed(tiny_config(), validation__eval_interval=0), 1, "eval_interval=0: must be pos"),
        (changed(tiny_config(), logger__log_interval=0), 1, "log_interval=0: must be positive"),
        (changed(tiny_config(), checkpoint__keep_last=-1), 1, "keep_last=-1: must be at least"),
        (changed(tiny_config(), dist__timeout_minutes=0.0), 1, "timeout_minutes"),
        (
            changed(tiny_config(), ddp__use_distributed_optimizer=False),
            1,
            "ddp.overlap_param_gather=true: needs ddp.use_distributed_optimizer=true",
        ),
        (changed(tiny_config(), ddp__overlap_grad_reduce=False), 1, "overlap_grad_reduce=true"),
        (
            tiny_config(optimizer=OptimizerConfig(optimizer="sgd", lr=1.0)),
            1,
            "optimizer.optimizer=sgd: cannot be distributed",
        ),
        (
            changed(tiny_config(), ddp__check_for_nan_in_grad=True, train__nan_action="skip"),
            1,
            "which train.nan_action=skip lets pass",
        ),
        (changed(tiny_config(), ddp__average_in_collective=True), 1, "average_in_collective"),
        (
            tiny_config(
                optimizer=OptimizerConfig(lr=1.0, use_distributed_optimizer=True),
                ddp=DistributedDataParallelConfig(),
            ),
            1,
            "optimizer.use_distributed_optimizer=true: contradicts ddp.use_distributed_opt",
        ),
        (
            changed(tiny_config(), optimizer__exp_avg_dtype=torch.bfloat16),
            1,
            "optimizer.exp_avg_dtype=bfloat16: can only be fp32",
        ),
        (
            changed(tiny_config(), optimizer__adam_beta1=1.5),
            1,
            "optimizer.adam_beta1=1.5: must be at least 0 and below 1; change it",
        ),
        (changed(tiny_config(), ddp__bucket_size=-1), 1, "ddp.bucket_size=-1: must be positive"),
        (
            transformer(
                recompute_granularity="full", recompute_method="uniform", recompute_num_layers=0
            ),
            1,
            "model.recompute_num_layers=0: must be positive; change it",
        ),
        (transformer(hidden_dropout=1.5), 1, "model.hidden_dropout=1.5: must be at least 0 and"),
        (
            transformer(num_moe_experts=4, moe_router_topk=5),
            1,
            "more than model.num_moe_experts=4 experts; lower it",
        ),
        (
            transformer(num_moe_experts=4, moe_layer_freq=[1, 0]),
            1,
            "model.moe_layer_freq=[1,0]: must have a number for each of model.num_layers=4 layers",
        ),
        (
            transformer(num_moe_experts=4, moe_router_load_balancing_type="auxloss"),
            1,
            "there is no auxloss; take one of aux_loss, seq",
        ),
        (transformer(tensor_model_parallel_size=2), 1, "1 ranks are not a multiple of"),
        (transformer(tensor_model_parallel_size=0), 1, "must be positive"),
        (transformer(tensor_model_parallel_size=8), 8, "model.num_attention_heads=4: is not a"),
        (transformer(num_query_groups=3), 1, "model.num_query_groups=3: does not divide"),
        (transformer(hidden_size=0), 1, "model.hidden_size=0: must be positive"),
        (transformer(sequence_parallel=True), 1, "model.sequence_parallel=true: needs"),
        (transformer(context_parallel_size=3), 3, "model.seq_length=16: is not a multiple of 2 x"),
        (
            transformer(tensor_model_parallel_size=2, sequence_parallel=True, seq_length=15),
            2,
            "which model.sequence_parallel=true needs",
        ),
        (transformer(virtual_pipeline_model_parallel_size=2), 1, "needs model.pipeline_model"),
        (
            transformer(
                num_layers=2,
                pipeline_model_parallel_size=2,
                pipeline_model_parallel_layout="E|t|t|L",
            ),
            2,
            "model.pipeline_model_parallel_layout: 4 stages on "
            "model.pipeline_model_parallel_size=2 ranks need "
            "model.virtual_pipeline_model_parallel_size=2",
        ),
        (
            transformer(
                num_layers=2,
                pipeline_model_parallel_size=2,
                virtual_pipeline_model_parallel_size=2,
                mtp_num_layers=1,
                pipeline_model_parallel_layout="Et|t|m|L",
            ),
            2,
            "model.pipeline_model_parallel_layout: the stage of the multi-token prediction layers "
            "(m) is on the rank of the embedding (E)",
        ),
        (transformer(pipeline_model_parallel_size=3), 3, "model.num_layers=4: is not a multiple"),
        (
            transformer(
                pipeline_model_parallel_size=2,
                virtual_pipeline_model_parallel_size=2,
                microbatch_group_size_per_vp_stage=8,
            ),
            2,
            "4 microbatches a step, which do not fill an interleaved pipeline",
        ),
        (transformer(expert_model_parallel_size=2), 2, "give model.num_moe_experts"),
        (
            transformer(expert_model_parallel_size=2, num_moe_experts=3),
            2,
            "model.num_moe_experts=3: is not a multiple of model.expert_model_parallel_size=2",
        ),
        (
            transformer(expert_model_parallel_size=4, num_moe_experts=4),
            2,
            "2 ranks are not a multiple of model.expert_tensor_parallel_size=1 x",
        ),
        (
            transformer(overlap_moe_expert_parallel_comm=True, num_moe_experts=2),
            1,
            "model.overlap_moe_expert_parallel_comm=true: needs",
        ),
        (
            transformer(
                tensor_model_parallel_size=2,
                num_moe_experts=2,
                moe_router_load_balancing_type="none",
            ),
            2,
            "model.num_moe_experts=2: on model.tensor_model_parallel_size=2 needs model.sequence_",
        ),
        (
            transformer(num_moe_experts=2, expert_tensor_parallel_size=2),
            2,
            "model.add_bias_linear=true: on model.expert_tensor_parallel_size=2 would add each",
        ),
        (
            transformer(num_moe_experts=2, moe_z_loss_coeff=0.0),
            1,
            "model.moe_z_loss_coeff=0: gives a z-loss whose value megatron-core divides by it",
        ),
        (
            transformer(num_moe_experts=2, mlp_chunks_for_training=2),
            1,
            "model.mlp_chunks_for_training=2: would take each chunk",
        ),
        (
            transformer(tensor_model_parallel_size=4, ffn_hidden_size=10),
            4,
            "model.ffn_hidden_size=10: is not a multiple of model.tensor_model_parallel_size=4",
        ),
        (
            transformer(num_moe_experts=2, expert_tensor_parallel_size=2, moe_ffn_hidden_size=5),
            2,
            "model.moe_ffn_hidden_size=5: is not a multiple of model.expert_tensor_parallel_size=2",
        ),
        (
            transformer(
                tensor_model_parallel_size=2,
                sequence_parallel=True,
                num_moe_experts=2,
                moe_shared_expert_intermediate_size=7,
            ),
            2,
            "model.moe_shared_expert_intermediate_size=7: is not a multiple of model.tensor_model",
        ),
        (
            transformer(
                pipeline_model_parallel_size=2, overlap_p2p_comm=True, batch_p2p_comm=False
            ),
            2,
            "model.overlap_p2p_comm=true: needs model.virtual_pipeline_model_parallel_size above 1",
        ),
        (transformer(use_ring_exchange_p2p=True), 1, "model.use_ring_exchange_p2p=true: needs"),
        (transformer(tp_comm_overlap=True), 1, "model.tp_comm_overlap=true: is not supported"),
        (
            changed(tiny_config(), ddp__num_distributed_optimizer_instances=2),
            2,
            "ddp.num_distributed_optimizer_instances=2: is not supported",
        ),
        (changed(tiny_config(), ddp__nccl_ub=True), 1, "ddp.nccl_ub=true: needs NCCL"),
        (
            transformer(fp8_param=True),
            1,
            "model.fp8_param=true: must be used together with fp8 mode; change it",
        ),
        (
            changed(
                transformer(calculate_per_token_loss=True), train__loss_normalization="microbatch"
            ),
            1,
            "model.calculate_per_token_loss=true: contradicts train.loss_normalization=microbatch",
        ),
        (
            transformer(params_dtype=torch.bfloat16),
            1,
            "model.params_dtype=bfloat16: contradicts mixed_precision.precision=fp32",
        ),
        (tiny_config(dataset=TinyData(size=4)), 1, "dataset.size=4 is less than one global batch"),
        (tiny_config(dataset=None), 1, "dataset: expected a DatasetConfig, got None"),
        (tiny_config(model=3), 1, "model: expected a ModelConfig, got 3, which has no build"),
        (tiny_config(), 0, "the world size 0 must be positive"),
    ],
)
def test_a_contradiction_is_named_with_its_fields(config: Any, world_size: int, says: str) -> None:
    problems = problems_of(config, world_size=world_size)
    assert any(says in line for line in problems), problems


def test_two_interleaved_stages_never_exchange_in_batches() -> None:
    model = TinyTransformer(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    for given in ("model.batch_p2p_comm=true", "model.overlap_p2p_comm=false"):
        with pytest.raises(ConfigError) as error:
            configure(tiny_config(model=model), [given], device="cpu", world_size=2)
        (line,) = error.value.problems
        assert line.startswith(f"{given}: contradicts model.virtual_pipeline_model_parallel_size=2")


def test_widths_that_no_layer_has_may_be_odd() -> None:
    model = TinyTransformer(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        num_moe_experts=2,
        ffn_hidden_size=9,
        moe_ffn_hidden_size=8,
        add_bias_linear=False,
    )
    resolve(tiny_config(model=model), device="cpu", world_size=2)


def test_a_problem_that_we_report_is_not_repeated_in_megatrons_words() -> None:
    problems = problems_of(transformer(tensor_model_parallel_size=8), world_size=8)
    assert sum("num_attention_heads" in line for line in problems) == 1


def test_a_check_that_fails_on_a_rejected_value_does_not_hide_the_report() -> None:
    config = tiny_config()
    config.dataset.size = "many"  # type: ignore[attr-defined]
    config.train.trian_iters = 1  # type: ignore[attr-defined]
    problems = problems_of(config)
    assert problems == [
        "train.trian_iters: unknown key; did you mean train.train_iters?",
        "dataset.size: expected an integer, got 'many'",
    ]
