from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, cast, override

import pytest
import torch
from megatron.core import parallel_state

from bridge.training.gpt_step import Batch, forward_step, get_batch
from bridge.training.state import GlobalState
from gpt_models import SEQUENCE, build_chunks, losses_of, microbatch, run_of, tiny_gpt
from ranks import run_ranks

ENDS = [0, 3, 8, 16]


def packed(seed: int = 0, ends: list[int] = ENDS, **extra: Any) -> dict[str, Any]:
    """Return a microbatch of documents that end at `ends`, positions counted in each."""
    lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    return {
        **microbatch(seed, length=ends[-1]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "cu_seqlens": torch.tensor([ends], dtype=torch.int32),
        **extra,
    }


def padded(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a microbatch whose last 6 tokens are padding."""
    sample = microbatch(seed)
    padding = torch.arange(SEQUENCE).unsqueeze(0) >= SEQUENCE - 6
    return sample | {"padding_mask": padding, "loss_mask": sample["loss_mask"] * ~padding}


def state_of(model: Any) -> GlobalState:
    return GlobalState(run_of(model))


def recorded(chunk: torch.nn.Module) -> list[dict[str, Any]]:
    """Return a list that will hold the arguments of every call of `chunk`."""
    calls: list[dict[str, Any]] = []
    chunk.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


class TestStages:
    def test_every_stage_role_gets_its_tensors_and_the_packing(self) -> None:
        def body() -> list[set[str]]:
            model = tiny_gpt(num_layers=3, pipeline_model_parallel_size=3)
            (chunk,) = build_chunks(model)
            calls = recorded(chunk)
            losses_of(partial(forward_step, state_of(model)), [chunk], [packed()])
            assert calls[0]["packed_seq_params"].cu_seqlens_q.tolist() == ENDS
            return [{name for name, value in call.items() if value is not None} for call in calls]

        first, middle, last = run_ranks(3, body)
        assert first == [{"input_ids", "position_ids", "packed_seq_params"}]
        assert middle == [{"packed_seq_params"}]
        assert last == [{"labels", "loss_mask", "packed_seq_params"}]

    def test_only_stage_gets_everything(self) -> None:
        def body() -> set[str]:
            (chunk,) = build_chunks(tiny_gpt())
            calls = recorded(chunk)
            output, _ = forward_step(state_of(tiny_gpt()), iter([packed()]), chunk)
            assert output.shape == (1, SEQUENCE)
            return {name for name, value in calls[0].items() if value is not None}

        tensors = {"input_ids", "position_ids", "labels", "loss_mask", "packed_seq_params"}
        assert run_ranks(1, body)[0] == tensors

    def test_interleaved_chunks_take_their_own_roles(self) -> None:
        def body() -> list[tuple[bool, bool]]:
            model = tiny_gpt(
                pipeline_model_parallel_size=2,
                virtual_pipeline_model_parallel_size=2,
                overlap_p2p_comm=True,
                batch_p2p_comm=False,
            )
            chunks = build_chunks(model)
            calls = [recorded(chunk) for chunk in chunks]
            losses_of(
                partial(forward_step, state_of(model)), chunks, [microbatch(i) for i in range(2)]
            )
            return [(c[0]["input_ids"] is not None, c[0]["labels"] is not None) for c in calls]

        assert run_ranks(2, body) == [
            [(True, False), (False, False)],
            [(False, False), (False, True)],
        ]

    def test_packing_under_a_pipeline_gives_the_loss_of_one_stage(self) -> None:
        def body(stages: int) -> list[list[float]]:
            model = tiny_gpt(num_layers=3, pipeline_model_parallel_size=stages)
            samples = [packed(0), packed(1, [0, 8, 16])]
            return losses_of(partial(forward_step, state_of(model)), build_chunks(model), samples)

        (alone,) = run_ranks(1, body, 1)
        *_, last = run_ranks(3, body, 3)
        torch.testing.assert_close(torch.tensor(last), torch.tensor(alone), rtol=1e-5, atol=0)


class TestPacking:
    def test_packed_documents_have_the_losses_they_have_alone(self) -> None:
        def body() -> float:
            model = tiny_gpt()
            (chunk,) = build_chunks(model)
            state, sample = state_of(model), packed()
            together, _ = forward_step(state, iter([sample]), chunk)
            alone = []
            for start, end in zip(ENDS, ENDS[1:], strict=False):
                names = ("tokens", "labels", "loss_mask", "position_ids")
                document = {name: sample[name][:, start:end] for name in names}
                alone.append(forward_step(state, iter([document]), chunk)[0])
            return float((together - torch.cat(alone, 1)).abs().max().detach())

        assert run_ranks(1, body)[0] < 1e-5

    def test_repeated_last_boundaries_are_removed(self) -> None:
        batch = read(packed(cu_seqlens=torch.tensor([[0, 3, 8, 16, 16, 16]], dtype=torch.int32)))
        assert batch.packed_seq_params is not None
        assert batch.packed_seq_params.cu_seqlens_q.tolist() == ENDS
        assert batch.packed_seq_params.max_seqlen_q == 8

    def test_given_max_seqlen_may_be_larger_than_the_longest_document(self) -> None:
        params = read(packed(max_seqlen=torch.tensor([16]))).packed_seq_params
        assert params is not None
        assert params.max_seqlen_q == 16

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"cu_seqlens": torch.tensor([[0, 3, 8]])}, "end at 8"),
            ({"cu_seqlens": torch.tensor([[0, 9, 8, 16]])}, "never fall"),
            ({"cu_seqlens": torch.tensor([[2, 8, 16]])}, "begin with 0"),
            ({"cu_seqlens": torch.tensor([ENDS, ENDS])}, "micro_batch_size=1"),
            ({"cu_seqlens_padded": torch.tensor([[0, 8, 16]])}, "no more tokens than it has"),
            ({"cu_seqlens_unpadded": torch.tensor([[0, 3, 9, 12]])}, "no more tokens than it has"),
            ({"cu_seqlens_unpadded": torch.tensor([[1, 2, 3, 4]])}, "must begin with 0"),
            (
                {
                    "cu_seqlens_unpadded": torch.tensor([ENDS]),
                    "cu_seqlens_padded": torch.tensor([ENDS]),
                },
                "one of cu_seqlens_padded and cu_seqlens_unpadded",
            ),
            (
                {"cu_seqlens": None, "cu_seqlens_unpadded": torch.tensor([ENDS])},
                "the microbatch has cu_seqlens_unpadded: give cu_seqlens",
            ),
            (
                {"attention_mask": torch.zeros(1, 1, 16, 16, dtype=torch.bool)},
                "attention_mask: the documents are packed",
            ),
        ],
    )
    def test_boundaries_that_do_not_fit_are_rejected(
        self, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read(packed(**change))

    @pytest.mark.parametrize(
        "names", [("cu_seqlens", "cu_seqlens_padded"), ("cu_seqlens_unpadded", "cu_seqlens")]
    )
    def test_both_names_of_padded_boundaries_are_read(self, names: tuple[str, str]) -> None:
        """Documents of 2, 5 and 6 tokens, padded to 3, 5 and 8."""
        own = torch.tensor([[0, 2, 7, 13]], dtype=torch.int32)
        laid_out = torch.tensor([ENDS], dtype=torch.int32)

        def body() -> float:
            model = tiny_gpt()
            (chunk,) = build_chunks(model)
            state, plain = state_of(model), packed()
            sample = packed() | dict(zip(names, (own, laid_out), strict=True))
            losses, _ = forward_step(state, iter([sample]), chunk)
            # The tokens of a document come before its padding, so they do not see it.
            expected, _ = forward_step(state, iter([plain]), chunk)
            return float((losses - expected)[0, [0, 1, *range(3, 14)]].abs().max().detach())

        params = read(packed() | dict(zip(names, (own, laid_out), strict=True))).packed_seq_params
        assert params is not None
        assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == own[0].tolist()
        assert params.cu_seqlens_q_padded.tolist() == ENDS
        assert params.max_seqlen_q == 8
        assert run_ranks(1, body) == [0]

    def test_middle_stage_rejects_the_same_boundaries(self) -> None:
        with pytest.raises(ValueError, match="end at 8"):
            read(packed(cu_seqlens=torch.tensor([[0, 8]])), inputs=False, targets=False)


class TestContextParallel:
    def test_each_rank_takes_its_two_chunks(self) -> None:
        def body() -> tuple[list[int], list[int]]:
            parallel_state.initialize_model_parallel(context_parallel_size=2)
            batch = get_batch(
                iter([microbatch()]), cp_group=parallel_state.get_context_parallel_group()
            )
            assert batch.position_ids is not None
            assert batch.tokens is not None
            torch.testing.assert_close(
                batch.tokens[0], microbatch()["tokens"][0][batch.position_ids[0]]
            )
            return batch.position_ids[0].tolist(), list(batch.tokens.shape)

        assert run_ranks(2, body) == [
            ([0, 1, 2, 3, 12, 13, 14, 15], [1, 8]),
            ([4, 5, 6, 7, 8, 9, 10, 11], [1, 8]),
        ]

    def test_each_rank_takes_two_chunks_of_every_packed_document(self) -> None:
        def body() -> tuple[list[int], list[int]]:
            parallel_state.initialize_model_parallel(context_parallel_size=2)
            group = parallel_state.get_context_parallel_group()
            sample = packed(ends=[0, 4, 16]) | {"position_ids": torch.arange(16).unsqueeze(0)}
            batch = get_batch(iter([sample]), cp_group=group)
            assert batch.position_ids is not None
            assert batch.packed_seq_params is not None
            return batch.position_ids[0].tolist(), batch.packed_seq_params.cu_seqlens_q.tolist()

        assert run_ranks(2, body) == [
            ([0, 3, 4, 5, 6, 13, 14, 15], [0, 4, 16]),
            ([1, 2, 7, 8, 9, 10, 11, 12], [0, 4, 16]),
        ]

    def test_documents_that_cannot_be_cut_are_rejected(self) -> None:
        def body() -> str:
            parallel_state.initialize_model_parallel(context_parallel_size=2)
            group = parallel_state.get_context_parallel_group()
            with pytest.raises(ValueError, match="multiples of 4") as caught:
                get_batch(iter([packed()]), cp_group=group)
            return str(caught.value)

        assert "cu_seqlens_padded" in run_ranks(2, body)[0]


class TestLossMask:
    def test_mask_reaches_the_model_on_both_branches(self) -> None:
        model = Recorder(overlap=True)
        for plan in (False, True):
            run(model, return_schedule_plan=plan)
        assert [call["loss_mask"] is not None for call in model.calls] == [True, True]

    def test_model_whose_forward_has_no_mask_is_not_given_one(self) -> None:
        model = MasklessRecorder(overlap=False)
        run(model)
        assert "loss_mask" not in model.calls[0]

    def test_mtp_layer_learns_nothing_from_masked_positions(self) -> None:
        def body() -> tuple[float, float]:
            model = tiny_gpt(mtp_num_layers=1, calculate_per_token_loss=True)
            (chunk,) = build_chunks(model)
            # The MTP layer predicts the label of position 5 from position 4.
            mask = torch.ones(1, SEQUENCE)
            mask[0, 5] = 0
            sample = microbatch() | {"loss_mask": mask}
            other = sample | {"labels": sample["labels"].clone()}
            other["labels"][0, 5] = (other["labels"][0, 5] + 1) % 64

            def gradients(sample: dict[str, torch.Tensor]) -> torch.Tensor:
                chunk.zero_grad()
                output, loss_function = forward_step(state_of(model), iter([sample]), chunk)
                loss_function(output)[0].backward()
                return torch.cat([p.grad.flatten() for p in chunk.mtp.parameters()])

            first = gradients(sample)
            return float((first - gradients(other)).abs().max()), float(first.abs().max())

        difference, size = run_ranks(1, body)[0]
        assert difference == 0
        assert size > 0

    def test_loss_counts_the_masked_in_positions(self) -> None:
        def body() -> bool:
            model = tiny_gpt()
            (chunk,) = build_chunks(model)
            sample = microbatch(batch=2)
            output, loss_function = forward_step(state_of(model), iter([sample]), chunk)
            loss_sum, count, _ = loss_function(output)
            expected = (output * sample["loss_mask"]).sum()
            return bool(torch.isclose(loss_sum, expected)) and int(count) == int(
                sample["loss_mask"].sum()
            )

        assert run_ranks(1, body) == [True]


class TestPaddingMask:
    def test_mask_reaches_the_routers(self) -> None:
        model = Recorder(overlap=False, experts=4)
        run(model, padded())
        assert torch.equal(model.calls[0]["padding_mask"], padded()["padding_mask"])

    def test_plan_is_rejected_because_routers_would_not_see_the_mask(self) -> None:
        with pytest.raises(ValueError, match="padding_mask: .* under model.overlap_moe"):
            run(Recorder(overlap=True, experts=4), padded(), return_schedule_plan=True)

    def test_every_stage_of_a_model_with_experts_gets_it(self) -> None:
        def body() -> list[int]:
            model = tiny_gpt(num_layers=3, pipeline_model_parallel_size=3, num_moe_experts=2)
            (chunk,) = build_chunks(model)
            calls = recorded(chunk)
            losses_of(partial(forward_step, state_of(model)), [chunk], [padded()])
            mask: torch.Tensor = calls[0]["padding_mask"]
            return mask[0].nonzero().flatten().tolist()

        assert run_ranks(3, body) == [list(range(10, 16))] * 3

    def test_context_parallel_rank_gets_its_two_chunks(self) -> None:
        def body() -> list[bool]:
            parallel_state.initialize_model_parallel(context_parallel_size=2)
            group = parallel_state.get_context_parallel_group()
            batch = get_batch(iter([padded()]), routers=True, cp_group=group)
            assert batch.padding_mask is not None
            return batch.padding_mask[0].tolist()

        # Positions 0-3 with 12-15, and 4-7 with 8-11, of which the last 6 of 16 are padding.
        assert run_ranks(2, body) == [[False] * 4 + [True] * 4, [False] * 6 + [True] * 2]

    def test_sequence_parallel_rank_after_the_first_stage_gets_its_shard(self) -> None:
        def body() -> list[bool]:
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
            model = Recorder(overlap=False, experts=4)
            model.pre_process, model.config.sequence_parallel = False, True
            model.pg_collection.tp = parallel_state.get_tensor_model_parallel_group()
            forward_step(state_of(tiny_gpt()), iter([padded()]), model)
            mask: torch.Tensor = model.calls[0]["padding_mask"]
            return mask[0].tolist()

        assert run_ranks(2, body) == [[False] * 8, [False] * 2 + [True] * 6]

    def test_model_that_has_no_use_for_the_padding_mask_gets_none(self) -> None:
        dense, deaf = Recorder(overlap=False), MasklessRecorder(overlap=False, experts=4)
        for model in (dense, deaf):
            run(model, padded())
            assert model.calls[0].get("padding_mask") is None

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.zeros(1, SEQUENCE), "torch.float32; give .* torch.bool"),
            (torch.zeros(SEQUENCE, dtype=torch.bool), "give .batch, sequence."),
            (torch.zeros(1, 4, dtype=torch.bool), "of the same shape"),
            (torch.arange(SEQUENCE).unsqueeze(0) < 10, "True at padding, where loss_mask"),
        ],
    )
    def test_wrong_padding_mask_is_rejected(self, mask: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read(padded() | {"padding_mask": mask}, routers=True)


class TestLaterTokens:
    def test_packed_documents_are_rejected(self) -> None:
        model = Recorder(overlap=False)
        model.config.mtp_num_layers = 1
        with pytest.raises(ValueError, match="set model.mtp_num_layers=null"):
            run(model, packed())


class TestSchedulePlan:
    def test_plan_gives_the_losses_and_gradients_of_the_plain_pass(self) -> None:
        def body(overlap: bool) -> tuple[list[list[float]], torch.Tensor]:
            model = tiny_gpt(
                num_layers=2,
                num_moe_experts=4,
                moe_token_dispatcher_type="alltoall",
                moe_z_loss_coeff=0.5,
                moe_router_load_balancing_type="seq_aux_loss",
                moe_aux_loss_coeff=1.0,
                mtp_num_layers=1,
                expert_model_parallel_size=2,
            )
            (chunk,) = build_chunks(model)
            # megatron-core requires 16 bits when the config is made; the test needs exact numbers.
            chunk.config.overlap_moe_expert_parallel_comm = overlap
            samples = [microbatch(i) for i in range(3)]
            step = partial(forward_step, state_of(model))
            losses = losses_of(step, [chunk], samples, forward_only=False)
            return losses, torch.cat([p.grad.flatten() for p in chunk.parameters()])

        plain, planned = (run_ranks(2, body, overlap) for overlap in (False, True))
        for (losses, gradients), (plan_losses, plan_gradients) in zip(plain, planned, strict=True):
            torch.testing.assert_close(plan_losses, losses, rtol=1e-5, atol=0)
            torch.testing.assert_close(plan_gradients, gradients, rtol=1e-4, atol=1e-6)


class TestRefusals:
    def test_plan_without_the_overlap_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="model.overlap_moe_expert_parallel_comm"):
            run(Recorder(overlap=False), return_schedule_plan=True)

    @pytest.mark.parametrize("name", ["tokens", "labels", "loss_mask", "position_ids"])
    def test_missing_tensor_is_rejected_by_name(self, name: str) -> None:
        sample = microbatch()
        del sample[name]
        with pytest.raises(ValueError, match=f"no {name}"):
            read(sample)

    def test_missing_iterator_is_rejected_on_a_middle_stage_too(self) -> None:
        nothing = cast(Iterator[Any], None)
        with pytest.raises(ValueError, match="every pipeline stage reads"):
            get_batch(nothing, inputs=False, targets=False)

    def test_missing_attention_mask_is_plain_causal_attention(self) -> None:
        assert read(microbatch()).attention_mask is None


class Recorder(torch.nn.Module):
    """A fake model chunk that keeps its arguments, since a real plan needs experts and bf16."""

    pre_process = post_process = True
    mtp_process = False

    def __init__(self, overlap: bool, experts: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            overlap_moe_expert_parallel_comm=overlap,
            num_moe_experts=experts,
            mtp_num_layers=None,
            sequence_parallel=False,
        )
        self.pg_collection = SimpleNamespace(cp=None, tp=None)
        self.calls: list[dict[str, Any]] = []

    @override
    def forward(self, loss_mask: torch.Tensor | None = None, **arguments: Any) -> None:
        self.calls.append(arguments | {"loss_mask": loss_mask})

    def build_schedule_plan(self, **arguments: Any) -> None:
        self.calls.append(arguments)


class MasklessRecorder(Recorder):
    @override
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        packed_seq_params: Any,
    ) -> None:
        self.calls.append({"labels": labels})


def run(model: Recorder, sample: dict[str, Any] | None = None, **arguments: Any) -> None:
    def body() -> list[dict[str, Any]]:
        forward_step(state_of(tiny_gpt()), iter([sample or microbatch()]), model, **arguments)
        return model.calls

    model.calls = in_rank(body)


def read(sample: dict[str, Any], **arguments: Any) -> Batch:
    return in_rank(lambda: get_batch(iter([sample]), **arguments))


def in_rank[T](function: Callable[[], T]) -> T:
    """Call `function` as a rank on the CPU would, in this process."""
    from bridge.training import cpu

    with cpu.cpu_training():
        return function()
