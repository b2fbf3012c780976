import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional

from bridge.gpt.model_config import GPTModelConfig
from bridge.training.config import TokenizerConfig
from bridge.training.config.model_identity import field_kinds, kind_at
from bridge.training.transformer import section
from gpt_models import build_chunks, run_of, tiny_gpt
from ranks import run_ranks


class TestDeferral:
    def test_values_stay_what_the_user_wrote(self) -> None:
        model = tiny_gpt(ffn_hidden_size=None, num_query_groups=None)
        before = vars(copy.copy(model)).copy()
        final = model.finalized()
        assert final.ffn_hidden_size == 4 * model.hidden_size
        assert final.num_query_groups == model.num_attention_heads
        assert vars(model) == before

    def test_finalized_copies_share_nothing(self) -> None:
        model = tiny_gpt(moe_layer_freq=[0, 0, 0, 0])
        first, second = model.finalized(), model.finalized()
        assert first is not second
        assert first.moe_layer_freq is not model.moe_layer_freq

    def test_chunks_of_a_rank_share_one_config(self) -> None:
        def body() -> tuple[bool, bool, bool]:
            model = tiny_gpt(
                pipeline_model_parallel_size=2,
                virtual_pipeline_model_parallel_size=2,
                overlap_p2p_comm=True,
                batch_p2p_comm=False,
            )
            first, second = build_chunks(model)
            # Hooks of a run on the shared config cannot be copied; the user's config can.
            first.config.no_sync_func = lambda: None
            twin = pickle.loads(pickle.dumps(model))
            return first.config is second.config, twin == model, copy.deepcopy(model) == model

        assert run_ranks(2, body) == [(True, True, True)] * 2

    def test_building_again_starts_from_a_fresh_config(self) -> None:
        def body() -> bool:
            model = tiny_gpt()
            (first,) = build_chunks(model)
            groups = first.pg_collection
            return model.build(groups, True, True, None).config is first.config

        assert run_ranks(1, body) == [False]

    def test_finalizing_warns_of_nothing(self) -> None:
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny_gpt().finalized()
        assert not caught

    def test_building_says_nothing_about_deprecation(self) -> None:
        def body() -> list[str]:
            heard: list[str] = []
            listener = logging.Handler()
            listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
            logging.getLogger().addHandler(listener)
            build_chunks(tiny_gpt())
            return [line for line in heard if "DEPRECATED" in line]

        assert run_ranks(1, body) == [[]]


class TestOpenFields:
    def test_cpu_takes_the_local_layers_and_no_fusion(self) -> None:
        model = GPTModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
        values = model.open_fields(run_of(model, tokenizer=TokenizerConfig()), device="cpu")
        assert values.pop("layer_spec") == "local"
        assert values.pop("vocab_size") == 257
        assert set(values.values()) == {False}

    @pytest.mark.parametrize("has_engine", [False, True])
    def test_gpu_takes_what_is_installed(
        self, has_engine: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(section, "has_transformer_engine", lambda: has_engine)
        monkeypatch.setattr(section, "has_fused_gradient_accumulation", lambda: False)
        model = tiny_gpt(layer_spec="auto", num_moe_experts=4)
        values = model.open_fields(run_of(model), device="cuda")
        assert values == {
            "layer_spec": "transformer_engine" if has_engine else "local",
            "gradient_accumulation_fusion": has_engine,
            "cross_entropy_loss_fusion": True,
            "bias_activation_fusion": True,
            "bias_dropout_fusion": True,
            "apply_rope_fusion": has_engine,
            "moe_grouped_gemm": has_engine,
            "moe_permute_fusion": has_engine,
            "deallocate_pipeline_outputs": False,
        }

    def test_layers_that_were_chosen_decide_the_rest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(section, "has_transformer_engine", lambda: True)
        model = tiny_gpt(layer_spec="local")
        values = model.open_fields(run_of(model), device="cuda")
        assert values["layer_spec"] == "local"
        assert values["apply_rope_fusion"] is False

    @pytest.mark.parametrize(
        ("changes", "fused"),
        [
            ({"activation_func": functional.silu, "gated_linear_unit": True}, True),
            ({"activation_func": functional.silu, "gated_linear_unit": False}, False),
            ({"activation_func": functional.gelu, "add_bias_linear": True}, True),
            (
                {
                    "activation_func": functional.gelu,
                    "add_bias_linear": False,
                    "gated_linear_unit": False,
                },
                False,
            ),
            ({"activation_func": functional.relu}, False),
        ],
    )
    def test_activation_is_fused_only_where_megatron_core_can(
        self, changes: dict[str, Any], fused: bool
    ) -> None:
        model = tiny_gpt(**changes)
        assert model.open_fields(run_of(model), device="cuda")["bias_activation_fusion"] is fused
        model.bias_activation_fusion = fused
        model.finalized()

    def test_layer_used_twice_accumulates_its_gradients_apart(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(section, "has_transformer_engine", lambda: True)
        model = tiny_gpt(layer_spec="auto", mtp_num_layers=2, mtp_use_repeated_layer=True)
        values = model.open_fields(run_of(model), device="cuda")
        assert values["gradient_accumulation_fusion"] is False

    def test_build_rejects_an_open_layer_spec(self) -> None:
        def body() -> None:
            with pytest.raises(ValueError, match="model.layer_spec"):
                build_chunks(tiny_gpt(layer_spec="auto"))

        run_ranks(1, body)


class TestVocabulary:
    @pytest.mark.parametrize(
        ("tokens", "multiple", "ranks", "padded"),
        [
            (50257, 128, 1, 50304),
            (50257, 128, 8, 50304),
            (128_256, 128, 2, 128_256),
            (257, 8, 3, 264),
            (257, 8, 1, 264),
            (10, 4, 3, 12),
        ],
    )
    def test_padding_is_the_same_under_every_layout_that_divides_it(
        self, tokens: int, multiple: int, ranks: int, padded: int
    ) -> None:
        model = tiny_gpt(
            vocab_size=tokens,
            make_vocab_size_divisible_by=multiple,
            tensor_model_parallel_size=ranks,
        )
        assert model.padded_vocab_size == padded

    def test_unknown_vocabulary_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="model.vocab_size"):
            _ = tiny_gpt(vocab_size=None).padded_vocab_size


class TestProblems:
    def test_valid_model_has_no_problem(self) -> None:
        assert problems(tiny_gpt()) == []

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"vocab_size": None}, "model.vocab_size"),
            ({"make_vocab_size_divisible_by": 0}, "model.make_vocab_size_divisible_by"),
            ({"multi_latent_attention": True}, "model.multi_latent_attention"),
            ({"experimental_attention_variant": "dsa"}, "model.experimental_attention_variant"),
            ({"heterogeneous_block_specs": True}, "model.heterogeneous_block_specs"),
            (
                {"mtp_num_layers": 1, "position_embedding_type": "learned_absolute"},
                "model.mtp_num_layers",
            ),
            ({"kv_channels": 7}, "model.kv_channels"),
            ({"layer_spec": "transformer_engine"}, "model.layer_spec"),
            ({"transformer_impl": "local"}, "model.transformer_impl"),
            ({"fp8": "hybrid"}, "model.fp8"),
            ({"gradient_accumulation_fusion": True}, "model.gradient_accumulation_fusion"),
            ({"num_moe_experts": 2, "add_bias_linear": True}, "model.add_bias_linear"),
            ({"num_moe_experts": 2, "moe_latent_size": 8}, "model.moe_latent_size"),
            (
                {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
                "model.recompute_modules",
            ),
        ],
    )
    def test_each_problem_is_one_line_that_begins_with_its_field(
        self, changes: dict[str, Any], name: str
    ) -> None:
        (line,) = problems(tiny_gpt(**changes))
        assert line.startswith((f"{name}: ", f"{name}="))

    def test_tokenizer_with_more_tokens_than_the_model_is_a_problem(self) -> None:
        (line,) = problems(tiny_gpt(vocab_size=100), tokenizer=TokenizerConfig(type="bytes"))
        assert "100" in line
        assert "257" in line

    def test_broken_tokenizer_is_a_problem(self) -> None:
        (line,) = problems(tiny_gpt(), tokenizer=TokenizerConfig(type="null"))
        assert line.startswith("tokenizer.vocab_size")


class TestFlops:
    @pytest.mark.parametrize("changes", [{}, {"gated_linear_unit": False, "ffn_hidden_size": None}])
    def test_flops_equal_those_that_torch_counts(self, changes: dict[str, Any]) -> None:
        def body() -> float:
            from torch.utils.flop_counter import FlopCounterMode

            model = tiny_gpt(**changes)
            (chunk,) = build_chunks(model)
            tokens = torch.zeros(2, model.seq_length, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter:
                chunk(tokens, tokens, None, labels=tokens).sum().backward()
            counts = counter.get_flop_counts()["Global"]
            products = sum(n for op, n in counts.items() if "mm" in str(op))
            return float(products / tokens.numel())

        model = tiny_gpt(**changes)
        attention = 6.0 * model.num_layers * model.seq_length * model.hidden_size
        assert model.training_flops_per_token() - attention == run_ranks(1, body)[0]

    def test_only_the_experts_of_a_token_count(self) -> None:
        dense, moe = tiny_gpt(), tiny_gpt(num_moe_experts=8, moe_router_topk=2, moe_layer_freq=2)
        expert = 3 * dense.hidden_size * (dense.ffn_hidden_size or 0)
        router = 8 * dense.hidden_size
        more = moe.training_flops_per_token() - dense.training_flops_per_token()
        assert more == 6 * 2 * (expert + router)  # two of four layers, one expert more in each


def problems(model: GPTModelConfig, **sections: Any) -> list[str]:
    return [str(problem) for problem in model.problems(run_of(model, **sections))]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("num_layers", "identity"),
        ("vocab_size", "identity"),
        ("seq_length", "extensible"),
        ("rope_scaling_factor", "extensible"),
        ("moe_aux_loss_coeff", "training"),
        ("layer_spec", "execution"),
    ],
)
def test_a_field_decides_the_models_identity_or_is_free(path: str, kind: str) -> None:
    assert kind_at(path, field_kinds(GPTModelConfig)) == kind
