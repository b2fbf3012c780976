import logging
import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, override

import megatron.core.tensor_parallel.random as tracked
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from bridge.training import cpu
from bridge.training.cpu import patches
from bridge.training.cpu.adam import FusedAdam
from ranks import run_ranks


@pytest.fixture
def cpu_emulation() -> Iterator[None]:
    with cpu.cpu_training():
        yield


def test_every_replaced_attribute_exists() -> None:
    assert not cpu.is_active()
    missing = [
        f"{owner.__name__}.{name}" for owner, name, _ in patches.table() if not hasattr(owner, name)
    ]
    assert missing == []


def test_no_attribute_is_replaced_twice() -> None:
    names = [(id(owner), name) for owner, name, _ in patches.table()]
    assert len(names) == len(set(names))


def test_nothing_is_left_behind() -> None:
    table = list(patches.table())
    owners = {id(owner): owner for owner, _, _ in table}.values()
    before = [dict(vars(owner)) for owner in owners]
    with cpu.cpu_training():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before
    assert not cpu.is_active()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_the_emulation_ends_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), cpu.cpu_training():
        raise ZeroDivisionError
    assert not cpu.is_active()


def test_entering_twice_leaves_once() -> None:
    cpu.enable()
    cpu.enable()
    with cpu.cpu_training():
        pass
    assert cpu.is_active()
    cpu.disable()
    assert not cpu.is_active()
    cpu.disable()


def test_it_says_that_it_is_active(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="bridge.training.cpu"), cpu.cpu_training():
        pass
    assert "CPU emulation" in caplog.text


def test_a_visible_gpu_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="a GPU is visible"):
        cpu.enable()
    assert not cpu.is_active()


@pytest.mark.usefixtures("cpu_emulation")
def test_moves_and_factories_that_name_cuda_give_cpu_tensors() -> None:
    tensor = torch.ones(2)
    made = [
        tensor.cuda(),
        tensor.to("cuda:0", non_blocking=True),
        tensor.to(device=torch.device("cuda"), dtype=torch.float64),
        tensor.new_zeros(2, device="cuda"),
        torch.empty(2, device=torch.cuda.current_device(), pin_memory=True),
        torch.nn.Linear(2, 2).to("cuda").weight,
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    assert {str(x.device) for x in made} == {"cpu"}
    assert made[2].dtype == torch.float64


@pytest.mark.usefixtures("cpu_emulation")
def test_tensor_type_names_cuda_to_megatron_cores_optimizer_alone() -> None:
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    namespace: dict[str, Any] = {"__name__": "megatron.core.optimizer.clip_grads"}
    exec("def type_of(tensor): return tensor.type()", namespace)
    assert namespace["type_of"](torch.ones(1)) == "torch.cuda.FloatTensor"


@pytest.mark.usefixtures("cpu_emulation")
def test_events_measure_milliseconds() -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
    end.record()
    assert 0 <= start.elapsed_time(end) < 1000


def seed_device(tensor_rank: int) -> None:
    tracked.model_parallel_cuda_manual_seed(
        7, tp_rank=tensor_rank, ep_rank=0, etp_rank=0, force_reset_rng=True
    )


@pytest.mark.usefixtures("cpu_emulation")
def test_dropout_is_replicated_outside_a_fork_and_differs_inside() -> None:
    def masks(tensor_rank: int, drawn_by_host: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5 + tensor_rank)
        seed_device(tensor_rank)
        torch.rand(drawn_by_host)
        replicated = functional.dropout(torch.ones(64), 0.5)
        with tracked.get_cuda_rng_tracker().fork():
            sharded = functional.dropout(torch.ones(64), 0.5)
        return replicated, sharded

    (replicated, sharded), (other_replicated, other_sharded) = masks(0, 1), masks(1, 999)
    assert torch.equal(replicated, other_replicated)
    assert not torch.equal(sharded, other_sharded)


@pytest.mark.usefixtures("cpu_emulation")
def test_the_device_does_not_move_the_hosts_stream() -> None:
    seed_device(0)
    before = torch.get_rng_state()
    functional.dropout(torch.ones(8), 0.5)
    with tracked.get_cuda_rng_tracker().fork():
        torch.rand(3)
        with tracked.get_cuda_rng_tracker().fork("expert-parallel-rng"):
            torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("cpu_emulation")
def test_forked_streams_continue_and_nested_ones_stay_apart() -> None:
    def draws(nested: bool) -> list[Tensor]:
        seed_device(0)
        fork = tracked.get_cuda_rng_tracker().fork
        values = []
        with fork():
            values.append(torch.rand(2))
            if nested:
                with fork("expert-parallel-rng"):
                    torch.rand(5)
            values.append(torch.rand(2))
        with fork():
            values.append(torch.rand(2))
        return values

    assert torch.equal(torch.stack(draws(nested=True)), torch.stack(draws(nested=False)))
    assert not torch.equal(*draws(nested=False)[:2])


@pytest.mark.usefixtures("cpu_emulation")
def test_a_stream_continues_after_a_fork_of_itself_two_levels_down() -> None:
    seed_device(0)
    with tracked.get_cuda_rng_tracker().fork():
        expected = [torch.rand(2) for _ in range(3)]
    seed_device(0)
    fork, drawn = tracked.get_cuda_rng_tracker().fork, []
    with fork():
        drawn.append(torch.rand(2))
        with fork("expert-parallel-rng"), fork():
            drawn.append(torch.rand(2))
        drawn.append(torch.rand(2))
    assert torch.equal(torch.stack(drawn), torch.stack(expected))


@pytest.mark.usefixtures("cpu_emulation")
def test_manual_seed_restarts_the_device_too() -> None:
    def mask() -> Tensor:
        torch.manual_seed(3)
        return functional.dropout(torch.ones(64), 0.5)

    assert torch.equal(mask(), mask())
    state = torch.cuda.get_rng_state()
    first = functional.dropout(torch.ones(64), 0.5)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, functional.dropout(torch.ones(64), 0.5))


@pytest.mark.usefixtures("cpu_emulation")
def test_recomputation_draws_the_same_numbers() -> None:
    seed_device(0)
    seen = []

    def layer(x: Tensor) -> Tensor:
        y = functional.dropout(x, 0.5)
        with tracked.get_cuda_rng_tracker().fork():
            y = functional.dropout(y, 0.5)
        seen.append(y.detach().clone())
        return y

    tracked.checkpoint(layer, False, torch.ones(64, requires_grad=True)).sum().backward()
    first, again = seen
    assert torch.equal(first, again)


class PlainAdam:
    """Compute Adam (arXiv:1412.6980), with weight decay decoupled (arXiv:1711.05101) or not."""

    def __init__(
        self, parameters: list[Tensor], decoupled: bool = True, decay: float = 0.1
    ) -> None:
        self.parameters, self.decoupled, self.decay = parameters, decoupled, decay
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        rate, beta1, beta2 = 0.1, 0.9, 0.999
        self.steps += 1
        for parameter, (first, second) in zip(self.parameters, self.moments, strict=True):
            assert parameter.grad is not None
            gradient = parameter.grad.clone()
            if self.decoupled:
                parameter.mul_(1 - rate * self.decay)
            else:
                gradient += self.decay * parameter
            first.mul_(beta1).add_((1 - beta1) * gradient)
            second.mul_(beta2).add_((1 - beta2) * gradient.square())
            mean, variance = first / (1 - beta1**self.steps), second / (1 - beta2**self.steps)
            parameter.sub_(rate * mean / (variance.sqrt() + 1e-8))


@pytest.mark.parametrize("decoupled", [True, False])
def test_fused_adam_is_adam(decoupled: bool) -> None:
    ours, theirs = (
        [torch.nn.Parameter(torch.arange(6.0)), torch.nn.Parameter(torch.ones(2, 2))]
        for _ in range(2)
    )
    with cpu.cpu_training():
        fused = FusedAdam(ours, lr=0.1, weight_decay=0.1, adam_w_mode=decoupled)
    plain = PlainAdam(list(theirs), decoupled)
    for step in range(5):
        for parameter in (*ours, *theirs):
            parameter.grad = parameter.detach().sin() + step
        fused.step()
        plain.step()
    for parameter, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("cpu_emulation")
def test_fused_adam_counts_steps_in_the_group_and_resumes() -> None:
    def stepped(optimizer: FusedAdam, parameter: Tensor, times: int) -> None:
        for _ in range(times):
            parameter.grad = parameter.detach().cos()
            optimizer.step()

    straight = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([straight], lr=0.1)
    stepped(optimizer, straight, 2)
    assert optimizer.param_groups[0]["step"] == 2
    assert set(optimizer.state[straight]) == {"exp_avg", "exp_avg_sq"}
    resumed = torch.nn.Parameter(straight.detach().clone())
    second = FusedAdam([resumed], lr=0.1)
    second.load_state_dict(deepcopy(optimizer.state_dict()))
    stepped(optimizer, straight, 2)
    stepped(second, resumed, 2)
    assert torch.equal(straight, resumed)


@pytest.mark.usefixtures("cpu_emulation")
def test_an_optimizer_does_not_load_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # importing it would raise
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_step_of_ddp_and_the_distributed_optimizer_is_adamw_on_the_mean_gradient() -> None:
    start = torch.arange(12.0).reshape(3, 4) / 10
    inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    class Model(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(start.clone())

        @override
        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight.T).square().mean()

    def train_on_a_rank() -> tuple[Tensor, float]:
        parallel_state.initialize_model_parallel()
        config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )
        model = DistributedDataParallel(config, ddp_config, Model(config))
        optimizer = get_megatron_optimizer(
            OptimizerConfig(lr=0.1, use_distributed_optimizer=True, clip_grad=0.5), [model]
        )
        part = inputs.chunk(2)[torch.distributed.get_rank()]
        for _ in range(3):
            model.zero_grad_buffer()
            model(part.cuda()).backward()
            model.finish_grad_sync()
            _, grad_norm, _ = optimizer.step()
        model.start_param_sync(force_sync=True)
        weights = [parameter.detach() for parameter in model.parameters()]
        return weights[0], float(grad_norm)

    weight = torch.nn.Parameter(start.clone())
    reference = PlainAdam([weight], decay=0.01)
    for _ in range(3):
        weight.grad = None
        (inputs @ weight.T).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], 0.5)
        reference.step()
    for rank_weight, rank_norm in run_ranks(2, train_on_a_rank):
        torch.testing.assert_close(rank_weight, weight.detach(), atol=1e-5, rtol=1e-5)
        assert rank_norm == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("rows", [(3, 1), (0, 2), (0, 0)])
def test_unequal_parts_are_gathered_and_their_gradients_scattered(rows: tuple[int, int]) -> None:
    def part_of(rank: int) -> Tensor:
        return torch.arange(10.0 * rank, 10.0 * rank + 2 * rows[rank]).reshape(-1, 2)

    def body() -> tuple[Tensor, Tensor | None]:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        group = parallel_state.get_tensor_model_parallel_group()
        part = part_of(group.rank()).requires_grad_()
        whole = gather_from_sequence_parallel_region(
            part, group=group, output_split_sizes=list(rows)
        )
        (whole * (group.rank() + 1)).sum().backward()
        return whole.detach(), part.grad

    for rank, (whole, gradient) in enumerate(run_ranks(2, body)):
        assert torch.equal(whole, torch.cat([part_of(0), part_of(1)]))
        assert gradient is not None
        assert torch.equal(gradient, torch.full((rows[rank], 2), 3.0))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_all_groups_of_a_process_share_what_waits_for_their_sockets() -> None:
    def body() -> tuple[int, list[float]]:
        groups = [dist.new_group(backend=backend) for backend in ("gloo", "nccl", None)]
        sums = []
        for group in groups:
            value = torch.tensor(float(dist.get_rank() + 1))
            dist.all_reduce(value, group=group)
            sums.append(float(value))
        descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        loops = [d for d in descriptors if os.path.islink(d) and "eventpoll" in os.readlink(d)]
        return len(loops), sums

    assert run_ranks(2, body) == [(1, [3.0, 3.0, 3.0])] * 2
