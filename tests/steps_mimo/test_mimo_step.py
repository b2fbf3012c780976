"""The forward step: the inputs and outputs of each role, and the mistakes that it rejects."""

from collections.abc import Iterator
from typing import Any, override

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.role import ModuleLayout, ModuleStageInfo, RankRole
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge.training.forward_step import prepare_forward_step_func
from bridge.training.mimo_step import KEYS, forward_step, get_batch, loss_func
from bridge.training.model.initial_weights import initialize_weights
from bridge.training.state import GlobalState
from mimo_models import IMAGE, build, microbatch, mimo_run, resolved, tiny_mimo
from ranks import run_ranks

PLAIN_KEYS = set(KEYS) - {"packing_kwargs"}


def state() -> GlobalState:
    return GlobalState(mimo_run("unused", tiny_mimo()))


class TestLossFunction:
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])

    def test_it_sums_the_losses_that_count(self) -> None:
        total, tokens, metrics = loss_func(self.mask, self.losses)
        assert total.item() == 8.0
        assert tokens.item() == 3
        assert not tokens.is_floating_point()
        assert metrics["lm loss"].tolist() == [8.0, 3.0]
        (gradient,) = torch.autograd.grad(total, self.losses)
        assert gradient.tolist() == self.mask.tolist()

    def test_one_number_is_the_mean_of_the_losses_that_count(self) -> None:
        mean = torch.tensor(2.5, requires_grad=True)
        total, tokens, _ = loss_func(self.mask, mean)
        assert (total.item(), tokens.item()) == (7.5, 3)
        assert torch.autograd.grad(total, mean)[0].item() == 3.0

    def test_a_mask_is_needed_and_in_the_shape_of_the_losses(self) -> None:
        with pytest.raises(ValueError, match="no loss_mask"):
            loss_func(None, self.losses.detach())
        with pytest.raises(ValueError, match="shape"):
            loss_func(self.mask[:1], self.losses.detach())

    def test_the_losses_are_a_tensor(self) -> None:
        output: Any = {"language": self.losses.detach()}
        with pytest.raises(ValueError, match="output_tensor: got dict"):
            loss_func(self.mask, output)


class TestGetBatch:
    def test_nested_tensors_are_moved_and_other_keys_are_skipped(self) -> None:
        def body() -> Any:
            given = microbatch() | {"name": "a", "attention_mask": torch.zeros(1)}
            batch = get_batch(iter([given]))
            assert batch is not None
            pixels = batch["modality_inputs"]["vision"]["encoder"]["pixels"]
            wanted = given["modality_inputs"]["vision"]["encoder"]["pixels"]
            return batch.keys() == PLAIN_KEYS, torch.equal(pixels, wanted), pixels.device.type

        assert run_ranks(1, body) == [(True, True, "cpu")]

    def test_lists_and_tuples_stay_what_they_are(self) -> None:
        def body() -> Any:
            inputs = {"audio": {"encoder": {"waves": [torch.ones(2), (torch.zeros(1), 3)]}}}
            batch = get_batch(iter([{"modality_inputs": inputs}]))
            assert batch is not None
            first, second = batch["modality_inputs"]["audio"]["encoder"]["waves"]
            return first.tolist(), second[0].tolist(), second[1], type(second).__name__

        assert run_ranks(1, body) == [([1.0, 1.0], [0.0], 3, "tuple")]

    def test_there_is_none_without_an_iterator_and_at_its_end(self) -> None:
        def body() -> Any:
            iterator = iter([microbatch()])
            return get_batch(None), get_batch(iterator) is None, get_batch(iterator)

        assert run_ranks(1, body) == [(None, False, None)]


class Recorder(torch.nn.Module):
    """A model of which this rank holds some stages. It keeps the names of its arguments."""

    def __init__(self, stages: dict[str, tuple[bool, bool]], output: Any) -> None:
        super().__init__()
        modules = {
            name: ModuleStageInfo(is_first_stage=first, is_last_stage=last)
            for name, (first, last) in stages.items()
        }
        self.role = RankRole(modules=modules, mode=ModuleLayout.NON_COLOCATED)
        self.special_token_ids = {"vision": IMAGE}
        self.output = output
        self.given: set[str] = set()

    @override
    def forward(self, **arguments: Any) -> tuple[Any, None]:
        self.given = {name for name, value in arguments.items() if value is not None}
        return self.output, None


def ran(model: Recorder, data: Any) -> Any:
    """Run the step on the data, in a process whose device is the CPU."""

    def body() -> Any:
        try:
            output, loss_function = forward_step(state(), data, model)
        except ValueError as error:
            return str(error)
        return model.given, type(output).__name__, loss_function is None

    return run_ranks(1, body)[0]


HIDDEN = torch.zeros(3, 2)
LOSSES = torch.zeros(2, 12)
INPUTS = {"input_ids", "modality_inputs", "embeddings_per_sample"}


class TestRoles:
    @pytest.mark.parametrize(
        ("stages", "output", "given", "is_terminal"),
        [
            ({"vision": (True, True)}, {"vision": HIDDEN}, INPUTS, False),
            (
                {"vision": (True, False)},
                {"vision": HIDDEN},
                {"input_ids", "modality_inputs"},
                False,
            ),
            ({"vision": (False, True)}, {"vision": HIDDEN}, {"embeddings_per_sample"}, False),
            ({"language": (True, False)}, {"language": HIDDEN}, {"input_ids", "position_ids"}, 0),
            ({"language": (False, True)}, LOSSES, {"labels", "loss_mask"}, True),
            ({"language": (True, True)}, LOSSES, PLAIN_KEYS - {"modality_inputs"}, True),
            ({"vision": (True, True), "language": (True, True)}, LOSSES, PLAIN_KEYS | INPUTS, True),
        ],
        ids=[
            "encoder",
            "first of encoder",
            "last of encoder",
            "first of language",
            "last of language",
            "language",
            "all",
        ],
    )
    def test_a_rank_reads_the_inputs_of_its_stages(
        self, stages: dict[str, Any], output: Any, given: set[str], is_terminal: bool
    ) -> None:
        kind = "Tensor" if is_terminal else "dict"
        model = Recorder(stages, output)
        assert ran(model, iter([microbatch()])) == (given, kind, not is_terminal)

    def test_the_middle_of_an_encoder_reads_nothing(self) -> None:
        def untouched() -> Iterator[Any]:
            raise AssertionError("data was read")
            yield

        stages = {"vision": (False, False)}
        assert ran(Recorder(stages, {"vision": HIDDEN}), untouched()) == (set(), "dict", True)
        assert ran(Recorder(stages, {"vision": HIDDEN}), None) == (set(), "dict", True)

    @pytest.mark.parametrize("stage", [(True, False), (False, False), (False, True)])
    def test_every_stage_of_the_language_model_reads_the_boundaries_of_packed_samples(
        self, stage: tuple[bool, bool]
    ) -> None:
        given = microbatch() | {"packing_kwargs": {"cu_seqlens_q": torch.tensor([0, 5, 9])}}
        found = ran(Recorder({"language": stage}, LOSSES), iter([given]))
        assert "packing_kwargs" in found[0]
        assert (
            "packing_kwargs"
            not in ran(Recorder({"language": stage}, LOSSES), iter([microbatch()]))[0]
        )

    def test_the_middle_of_the_language_model_needs_no_data(self) -> None:
        stages = {"language": (False, False)}
        assert ran(Recorder(stages, {"language": HIDDEN}), None) == (set(), "dict", True)

    @pytest.mark.parametrize(
        ("stages", "data", "says"),
        [
            (
                {"vision": (True, True)},
                None,
                "rank 0, first stage of vision: there is no microbatch",
            ),
            (
                {"language": (False, True)},
                iter([]),
                "rank 0, last stage of language: there is no microbatch",
            ),
            (
                {"vision": (True, True)},
                iter([{"labels": LOSSES}]),
                "rank 0, first stage of vision: the microbatch has no input_ids",
            ),
            (
                {"vision": (False, True)},
                iter([{"labels": LOSSES}]),
                "rank 0, last stage of vision: the microbatch has no input_ids",
            ),
            (
                {"language": (True, False)},
                iter([{"input_ids": LOSSES}]),
                "rank 0, first stage of language: the microbatch has no position_ids",
            ),
            (
                {"language": (False, True)},
                iter([{"labels": LOSSES, "loss_mask": None}]),
                "rank 0, last stage of language: the microbatch has no loss_mask",
            ),
            (
                {"language": (False, True)},
                iter([{"tokens": LOSSES}]),
                "the microbatch has no labels and no loss_mask",
            ),
        ],
    )
    def test_a_missing_input_is_an_error_of_that_stage(
        self, stages: dict[str, Any], data: Any, says: str
    ) -> None:
        assert says in ran(Recorder(stages, LOSSES), data)

    @pytest.mark.parametrize("output", [{"language": LOSSES}, None, [LOSSES]])
    def test_the_end_of_the_language_model_must_return_a_tensor(self, output: Any) -> None:
        message = ran(Recorder({"language": (True, True)}, output), iter([microbatch()]))
        assert message.startswith("rank 0, last stage of language: the model returned ")
        assert message.endswith("must return the tokens' losses, or their mean, as a tensor")

    def test_a_schedule_plan_is_rejected(self) -> None:
        model = Recorder({"language": (True, True)}, LOSSES)
        with pytest.raises(ValueError, match="a multimodal model has no schedule plan"):
            forward_step(state(), iter([microbatch()]), model, return_schedule_plan=True)

    def test_the_loop_recognizes_its_form(self) -> None:
        prepared = prepare_forward_step_func(forward_step, state())
        assert prepared.takes_schedule_plan
        assert prepared._form.takes_state


def losses_of_all_modules() -> list[list[float]]:
    output, loss_function = forward_step(state(), iter([microbatch()]), build(tiny_mimo()))
    assert loss_function is not None
    total, tokens, _ = loss_function(output)
    return [*output.tolist(), [total.item(), tokens.item()]]


def on_ranks_of_their_own() -> Any:
    """Run the encoder on rank 0 and the language model on rank 1, and send its input by hand."""
    grids = {name: grid_at(offset) for offset, name in enumerate(("vision", "language"))}
    mine = ("vision", "language")[torch.distributed.get_rank()]
    groups = groups_of(grids[mine])
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    model = resolved(tiny_mimo()).build_modules({mine: groups}, grids)
    initialize_weights([model], 1, groups)
    if mine == "vision":
        output, loss_function = forward_step(state(), iter([microbatch()]), model)
        torch.distributed.send(output["vision"].detach().contiguous(), 1)
        return set(output), loss_function, sorted(model.modules_on_this_rank())
    received = torch.empty(8, 32)
    torch.distributed.recv(received, 0)
    model.set_input_tensor([{"vision": received}])  # type: ignore[no-untyped-call]
    output, loss_function = forward_step(state(), iter([microbatch()]), model)
    assert loss_function is not None
    total, tokens, _ = loss_function(output)
    return [*output.tolist(), [total.item(), tokens.item()]]


def grid_at(offset: int) -> HyperCommGrid:
    grid = HyperCommGrid([1, 1, 1, 1], ["tp", "cp", "pp", "dp"], rank_offset=offset, backend="gloo")
    for dimensions in ("tp", "cp", "pp", "dp", ["dp", "cp"]):
        grid.create_pg(dimensions)
    return grid


def groups_of(grid: HyperCommGrid) -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    groups.tp, groups.cp = grid.get_pg("tp"), grid.get_pg("cp")
    groups.pp, groups.dp = grid.get_pg("pp"), grid.get_pg("dp")
    groups.dp_cp = grid.get_pg(["dp", "cp"])
    groups.embd = groups.pos_embd = grid.get_pg("pp")
    return groups


def test_modules_on_separate_ranks_have_the_losses_of_all_on_one() -> None:
    (together,) = run_ranks(1, losses_of_all_modules)
    encoder, language = run_ranks(2, on_ranks_of_their_own)
    assert encoder == ({"vision"}, None, ["vision"])
    assert language == together


def test_a_missing_input_is_an_error_with_the_real_model_too() -> None:
    def body() -> list[str]:
        model = build(tiny_mimo())
        messages = []
        for lacking in ("loss_mask", "labels", "input_ids"):
            batch = {key: value for key, value in microbatch().items() if key != lacking}
            with pytest.raises(ValueError, match=f"microbatch has no {lacking}") as caught:
                forward_step(state(), iter([batch]), model)
            messages.append(str(caught.value).partition(":")[0])
        return messages

    last, first = "rank 0, last stage of language", "rank 0, first stage of vision"
    assert run_ranks(1, body) == [[last, last, first]]
