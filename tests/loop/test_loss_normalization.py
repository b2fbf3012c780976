"""The adapter by itself, and with megatron-core's own schedules, DDP and finalizer.

test_oracles.py has its losses and gradients in whole runs.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, override

import pytest
import torch

from bridge.training.loss.normalization import LossAdapter
from bridge.training.loss_reduction import MetricReducer, maximum
from bridge.training.losses import masked_token_loss
from loss_cells import (
    CASES,
    SLOTS,
    Cells,
    Normalization,
    microbatches_of,
    objective,
    random_cells,
    world_size,
)
from ranks import run_ranks

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
WEIGHT = 3.0


@dataclass
class Outcome:
    gradients: list[float]
    values: dict[str, float | None]
    flag: bool


def token_batch(loss_sum: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token losses [SLOTS, 1, 1] that sum to `loss_sum` where valid, with junk elsewhere."""
    losses = torch.full((SLOTS, 1, 1), 1e6)
    mask = torch.zeros(SLOTS, 1, 1)
    losses[:tokens] = loss_sum / max(tokens, 1)
    mask[:tokens] = 1.0
    return losses, mask


def sum_and_count(mask: torch.Tensor, output: torch.Tensor) -> Any:
    return masked_token_loss(mask, output)


def own_mean(mask: torch.Tensor, output: torch.Tensor) -> Any:
    loss_sum, num_tokens, _ = masked_token_loss(mask, output)
    loss = loss_sum / num_tokens.clamp(min=1)
    return loss, {"lm loss": loss.detach()}


def run_schedule(
    cells: Cells,
    normalization: Normalization,
    loss_func: Callable[..., Any],
    *,
    pipeline: int = 1,
) -> Outcome:
    """Take a step of a model with one weight a stage: output = product of weights * losses."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    context = len(cells[0][0])
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=pipeline, context_parallel_size=context
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = TransformerConfig(
        num_layers=pipeline,
        hidden_size=1,
        num_attention_heads=1,
        context_parallel_size=context,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=normalization == "token",
        deallocate_pipeline_outputs=pipeline > 1,
    )
    config.finalize_model_grads_func = finalize_model_grads
    first, last = groups.pp.rank() == 0, groups.pp.rank() == pipeline - 1

    class OneWeight(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            self.model_type = ModelType.encoder_or_decoder
            self.pre_process, self.post_process = first, last
            self.share_embeddings_and_output_weights = False
            self.weight = torch.nn.Parameter(torch.tensor([WEIGHT if last else 1.0]))
            self.received: torch.Tensor | None = None

        def set_input_tensor(self, tensors: list[torch.Tensor]) -> None:
            self.received = tensors[0]

        @override
        def forward(self, losses: torch.Tensor) -> torch.Tensor:
            if not first:
                assert self.received is not None
                losses = self.received
            return self.weight * losses

    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(), OneWeight(), pg_collection=groups
    )

    def forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
        losses, mask = next(data_iterator)
        return model(losses), partial(loss_func, mask)

    adapter = LossAdapter(
        forward_step,
        normalization=normalization,
        padded_tokens=SLOTS,
        context_parallel_size=context,
        context_parallel_group=groups.cp,
    )
    mine = [microbatch[groups.cp.rank()] for microbatch in cells[groups.dp.rank()]]
    records = get_forward_backward_func(pp_size=pipeline, vp_size=None)(
        forward_step_func=adapter,
        data_iterator=iter([token_batch(*cell) for cell in mine]),
        model=model,
        num_microbatches=len(mine),
        seq_length=SLOTS * context,
        micro_batch_size=1,
        forward_only=False,
        pg_collection=groups,
        p2p_communicator=P2PCommunicator(groups.pp, config) if pipeline > 1 else None,
    )
    reducer = MetricReducer(
        normalization=normalization,
        contributes=last,
        device=CPU,
        context_parallel_size=context,
        context_parallel_group=groups.cp,
    )
    reduced = reducer.reduce(records, anomaly_flag=adapter.watch.anomaly_flag())
    gradients = [float(weight.main_grad) for weight in model.parameters()]  # type: ignore[attr-defined]
    return Outcome(gradients, reduced.to_dict(), reduced.has_anomaly)


LOSS_FUNCS = {1: own_mean, 2: sum_and_count}


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
@pytest.mark.parametrize("pattern", [1, 2])
def test_every_pipeline_stage_gets_its_gradient_and_learns_the_loss(
    normalization: Normalization, pattern: int
) -> None:
    cells = CASES["B"]
    want = float(objective(microbatches_of(cells), normalization, pattern))
    outcomes = run_ranks(
        4, partial(run_schedule, pipeline=2), cells, normalization, LOSS_FUNCS[pattern]
    )
    for rank, outcome in enumerate(outcomes):
        # The first stage's weight is 1 and its gradient goes through the last stage's, WEIGHT.
        slope = WEIGHT if rank < 2 else 1.0
        assert outcome.gradients == [pytest.approx(slope * want, rel=1e-6)]
        assert outcome.values == {"lm loss": pytest.approx(WEIGHT * want, rel=1e-6)}


def _many_cells(trials: Sequence[tuple[Cells, Normalization, int]]) -> list[Outcome]:
    return [run_schedule(cells, mode, LOSS_FUNCS[pattern]) for cells, mode, pattern in trials]


@pytest.mark.parametrize(("data", "context"), [(4, 1), (1, 4)])
def test_random_cells_give_the_objective(data: int, context: int) -> None:
    modes: list[tuple[Normalization, int]] = [("token", 2), ("token", 1), ("microbatch", 2)]
    trials: list[tuple[Cells, Normalization, int]] = [
        (random_cells(seed, data, microbatches, context), normalization, pattern)
        for seed, (microbatches, (normalization, pattern)) in enumerate(
            itertools.product([1, 2, 4], modes)
        )
    ]
    for outcomes in run_ranks(data * context, _many_cells, trials):
        for (cells, normalization, pattern), outcome in zip(trials, outcomes, strict=True):
            want = float(objective(microbatches_of(cells), normalization, pattern))
            assert outcome.gradients == [pytest.approx(want, rel=1e-5)], cells
            logged = outcome.values["lm loss"]
            assert (logged or 0.0) == pytest.approx(WEIGHT * want, rel=1e-5), cells


def test_the_same_tokens_weigh_the_same_however_they_are_cut() -> None:
    cut = [(12, 4), (30, 12), (8, 1), (6, 3)]
    layouts: list[Cells] = [
        [[[cell] for cell in cut]],
        [[[cut[0]], [cut[1]]], [[cut[2]], [cut[3]]]],
        [[[cut[0], cut[1]], [cut[2], cut[3]]]],
        [[cut]],
    ]
    for cells in layouts:
        for outcome in run_ranks(world_size(cells), run_schedule, cells, "token", sum_and_count):
            assert outcome.gradients == [pytest.approx(2.8, rel=1e-6)]
            assert outcome.values == {"lm loss": pytest.approx(WEIGHT * 2.8, rel=1e-6)}


def alias_of_the_loss(mask: torch.Tensor, output: torch.Tensor) -> Any:
    loss, num_tokens, _ = masked_token_loss(mask, output)
    return loss, num_tokens, {"x": loss.detach(), "pair": torch.stack((loss, num_tokens)).detach()}


def alias_of_the_mean(mask: torch.Tensor, output: torch.Tensor) -> Any:
    loss = output[:4].mean()
    return loss, {"x": loss.detach()}


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
@pytest.mark.parametrize("loss_func", [alias_of_the_loss, alias_of_the_mean])
def test_a_metric_that_is_the_loss_itself_logs_its_value_at_any_number_of_microbatches(
    normalization: Normalization, loss_func: Callable[..., Any]
) -> None:
    def values() -> list[float | None]:
        return [
            run_schedule([[[(8, 4)]] * count], normalization, loss_func).values["x"]
            for count in (1, 2, 4)
        ]

    want = WEIGHT * (8 if loss_func is alias_of_the_loss else 2)
    assert run_ranks(1, values) == [[pytest.approx(want)] * 3]


# ---- the adapter by itself -------------------------------------------------------------------


def adapter_of(
    loss_func: Callable[..., Any] | None,
    *,
    normalization: Normalization = "token",
    output: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[LossAdapter, Callable[..., Any]]:
    """Return an adapter, and a function that runs one microbatch through it."""
    given = torch.ones(2, requires_grad=True) if output is None else output
    adapter = LossAdapter(
        lambda data_iterator, model: (given, loss_func),
        normalization=normalization,
        padded_tokens=8,
        **arguments,
    )

    def run(**kwargs: Any) -> Any:
        result, wrapped = adapter(None, torch.nn.Identity())
        return wrapped(result, **kwargs)

    return adapter, run


def rejection_of(returned: Any) -> str:
    _, run = adapter_of(lambda output: returned(output) if callable(returned) else returned)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        run()
    return str(caught.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda o: o.sum(), "a tensor of shape"),
        (lambda o: (o.sum(),), "a tuple of 1"),
        (lambda o: (o.sum(), 1, {}, {}), "a tuple of 4"),
        (lambda o: {"loss": o.sum(), "n": 1}, "a dict"),
        (None, "None"),
        (lambda o: (o.sum(), o.sum()), "for its metrics"),
        (lambda o: (o, {}), "shape (2,)"),
        (lambda o: (1.0, {}), "a float for the loss"),
        (lambda o: (o.sum().long(), {}), "torch.int64 for the loss"),
        (lambda o: (o.sum(), torch.tensor(2.0), {}), "num_tokens.to(torch.int)"),
        (lambda o: (o.sum(), 2.0, {}), "for num_tokens"),
        (lambda o: (o.sum(), True, {}), "for num_tokens"),
        (lambda o: (o.sum(), torch.ones(2, dtype=torch.int), {}), "for num_tokens"),
        (lambda o: (o.sum(), torch.tensor(True), {}), "torch.bool"),
        (lambda o: (o.sum(), {"my metric": torch.zeros(5)}), "'my metric'"),
        (lambda o: (o.sum().detach(), {}), "does not depend on the model's output"),
    ],
)
def test_a_value_that_cannot_be_a_loss_is_rejected_with_the_accepted_forms(
    returned: Any, message: str
) -> None:
    assert message in rejection_of(returned)


def test_a_forward_step_without_a_loss_function_is_rejected_on_the_last_stage() -> None:
    with pytest.raises(ValueError, match="None for loss_func on the last pipeline stage"):
        adapter_of(None)[1]()
    adapter = LossAdapter(lambda data, model: torch.ones(1), normalization="token", padded_tokens=1)
    with pytest.raises(ValueError, match=r"return \(output, loss_func\)"):
        adapter(None, torch.nn.Identity())


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
def test_patterns_may_not_alternate_within_a_run(normalization: Normalization) -> None:
    returns = iter([2, 2, 1])

    def loss_func(output: torch.Tensor) -> Any:
        return (output.sum(), 2, {}) if next(returns) == 2 else (output.mean(), {})

    _, run = adapter_of(loss_func, normalization=normalization)
    run()
    run()
    with pytest.raises(ValueError, match="2 elements, and 3 earlier"):
        run()


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
@pytest.mark.parametrize("pattern", [1, 2])
def test_megatron_may_rescale_and_free_what_it_gets_without_touching_the_users_tensors(
    normalization: Normalization, pattern: int
) -> None:
    kept = torch.tensor(6.0, requires_grad=True)
    count = torch.tensor(3, dtype=torch.int32)
    metric = kept.detach()
    returned = (kept, {"x": metric}) if pattern == 1 else (kept, count, {"x": metric})
    _, run = adapter_of(lambda output: returned, normalization=normalization)

    loss, *rest, record = run()
    assert loss._base is None
    with torch.no_grad():
        loss *= 7
        for tensor in rest:
            tensor += 7
        loss.data = torch.empty(1)

    assert (kept.item(), count.item(), metric.item()) == (6.0, 3, 6.0)
    with torch.no_grad():  # nor does the user touch the record
        kept.zero_()
    assert record.loss.item() == 6.0
    assert record.metrics["x"].value.item() == 6.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_losses_are_scaled_in_float32(dtype: torch.dtype) -> None:
    output = torch.tensor([256.0, 0.0], dtype=dtype, requires_grad=True)
    adapter, run = adapter_of(lambda o: (o.sum(), {}), output=output)
    adapter.padded_tokens = 2**20
    loss, tokens, record = run()
    assert loss.dtype == record.loss.dtype == torch.float32
    assert loss.item() == 2.0**28
    assert tokens.item() == 2**20


def test_a_microbatch_without_tokens_is_not_divided_by_its_count() -> None:
    output = torch.ones(2, requires_grad=True)
    _, run = adapter_of(lambda o: (o.sum() * 0, 0, {}), normalization="microbatch", output=output)
    loss = run()[0]
    loss.backward()
    assert loss.item() == 0.0
    assert output.grad is not None
    assert output.grad.tolist() == [0.0, 0.0]


def test_counts_reach_the_schedule_as_int32_scalars() -> None:
    for count in (3, torch.tensor(3), torch.tensor([3]), torch.tensor(3, dtype=torch.int16)):
        _, run = adapter_of(lambda o, count=count: (o.sum(), count, {}))
        _, given, record = run()
        assert given.dtype == torch.int32
        assert given.shape == ()
        assert given.item() == record.count.item() == 3


def test_without_metrics_the_objective_is_logged_as_loss() -> None:
    for returned, want in ((lambda o: (o.sum() * 4, 2, {}), 4.0), (lambda o: (o.mean(), {}), 1.0)):
        _, run = adapter_of(returned)
        reducer = MetricReducer(normalization="token", contributes=True, device=CPU)
        assert reducer.reduce([run()[-1]]).to_dict() == {"loss": want}


def test_declared_metrics_pass_through() -> None:
    _, run = adapter_of(lambda o: (o.mean(), {"x": maximum(o.max()), "y": 2.5}))
    reducer = MetricReducer(normalization="token", contributes=True, device=CPU)
    assert reducer.reduce([run()[-1]]).to_dict() == {"x": 1.0, "y": 2.5}


def test_collected_data_is_whatever_the_loss_function_returns() -> None:
    def with_keyword(output: torch.Tensor, non_loss_data: bool = False) -> Any:
        return {"seen": non_loss_data}

    def any_keyword(output: torch.Tensor, **kwargs: Any) -> Any:
        return kwargs

    def without(output: torch.Tensor) -> Any:
        return [output, "text"]

    output = torch.ones(2)
    assert adapter_of(with_keyword)[1](non_loss_data=True) == {"seen": True}
    assert adapter_of(partial(with_keyword))[1](non_loss_data=True) == {"seen": True}
    assert adapter_of(any_keyword)[1](non_loss_data=True) == {"non_loss_data": True}
    collected = adapter_of(without, output=output)[1](non_loss_data=True)
    assert collected[0] is output
    assert adapter_of(None, output=output)[1](non_loss_data=True) is output


def test_the_schedule_plan_is_asked_for_only_where_megatron_wants_one() -> None:
    def forward_step(data: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        return return_schedule_plan, lambda output: (output, {})

    adapter = LossAdapter(forward_step, normalization="token", padded_tokens=1)
    assert adapter(None, torch.nn.Identity())[0] is False
    assert adapter(None, torch.nn.Identity(), return_schedule_plan=True)[0] is True


@pytest.mark.parametrize(
    "arguments", [{"padded_tokens": 0}, {"padded_tokens": 8, "context_parallel_size": 2}]
)
def test_impossible_settings_are_rejected(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(arguments))):
        LossAdapter(lambda data, model: None, normalization="token", **arguments)


def test_each_loss_is_shown_to_who_asked() -> None:
    seen: list[float] = []
    _, run = adapter_of(lambda o: (o.sum(), {}), on_loss=lambda loss: seen.append(loss.item()))
    run()
    assert seen == [2.0]


# ---- NaN and Inf -----------------------------------------------------------------------------


def test_a_nan_prediction_raises_the_anomaly_flag_and_no_valid_token_does_not() -> None:
    def trial(losses: list[float], mask: list[int]) -> bool:
        output = torch.tensor(losses, requires_grad=True)
        adapter, run = adapter_of(partial(masked_token_loss, torch.tensor(mask)), output=output)
        run()
        return bool(adapter.watch.anomaly_flag())

    assert trial([1.0, NAN], [1, 1])
    assert not trial([1.0, NAN], [1, 0])
    assert not trial([NAN, NAN], [0, 0])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("normalization", ["token", "microbatch"])
@pytest.mark.parametrize("pattern", [1, 2])
def test_nothing_waits_for_the_gpu_before_the_metrics_are_read(
    normalization: Normalization, pattern: int
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    mask = torch.ones(4, device=device)

    def loss_func(output: torch.Tensor) -> Any:
        loss, count, metrics = masked_token_loss(mask, output)
        more = {"f": 2.5, "host": torch.tensor(4.0), "top": maximum(output.max()), **metrics}
        return (loss / 4, more) if pattern == 1 else (loss, count, more)

    output = torch.arange(4.0, device=device, dtype=torch.bfloat16, requires_grad=True)
    adapter, run = adapter_of(loss_func, normalization=normalization, output=output)
    reducer = MetricReducer(normalization=normalization, contributes=True, device=device)
    want = {"f": 2.5, "host": 4.0, "top": 3.0, "lm loss": 1.5}
    for _ in range(2):
        adapter.watch.start("step 1")
        torch.cuda.set_sync_debug_mode("error")
        try:
            records = [run()[-1] for _ in range(3)]
            reduced = reducer.reduce(records, anomaly_flag=adapter.watch.anomaly_flag())
            adapter.watch.clear()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert reduced.to_dict() == want
        assert not reduced.has_anomaly
