from typing import Any, override

import pytest
import torch

from bridge.gpt.data.tokenization.tokenizers import ByteTokenizer
from bridge.gpt.sampling import sample_text
from bridge.training.cpu.adam import FusedAdam
from gpt_models import build_chunks, tiny_gpt
from ranks import run_ranks

TEXT = "abcdefg. "


def byte_gpt(**changes: Any) -> Any:
    return tiny_gpt(num_layers=2, seq_length=32, vocab_size=257, **changes)


def trained(model: Any) -> Any:
    """Return a chunk that has learned a text which repeats itself."""
    (chunk,) = build_chunks(model)
    optimizer = FusedAdam(chunk.parameters(), lr=1e-2)
    text = torch.tensor(list((TEXT * 5).encode()))
    rows = torch.stack([text[i : i + 33] for i in range(len(TEXT))])
    positions = torch.arange(32).expand(len(TEXT), -1)
    for _ in range(40):
        loss = chunk(rows[:, :-1].contiguous(), positions, None, labels=rows[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return chunk


def test_model_continues_what_it_has_learned_beyond_its_sequence_length() -> None:
    def body() -> tuple[str, bool]:
        chunk = trained(byte_gpt())
        text = sample_text(chunk, ByteTokenizer(), "abc", num_tokens=50, temperature=0)
        return text, chunk.training

    assert run_ranks(1, body) == [((TEXT * 7)[3:53], True)]


def test_draws_are_a_function_of_the_seed() -> None:
    def body() -> list[str]:
        (chunk,) = build_chunks(byte_gpt())
        return [
            sample_text(chunk, ByteTokenizer(), "a", num_tokens=12, temperature=1.0, seed=seed)
            for seed in (1, 1, 2)
        ]

    first, again, other = run_ranks(1, body)[0]
    assert first == again != other


def test_tensor_parallel_ranks_draw_the_same_text_as_one() -> None:
    def body(**layout: Any) -> str:
        (chunk,) = build_chunks(byte_gpt(**layout))
        return sample_text(chunk, ByteTokenizer(), "a", num_tokens=12, temperature=1.0)

    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert run_ranks(2, lambda: body(**split)) == run_ranks(1, body) * 2


def test_padded_vocabulary_and_the_end_of_document_are_never_text() -> None:
    class Chatty(ByteTokenizer):
        @property
        @override
        def vocab_size(self) -> int:
            return 3

        @property
        @override
        def eod(self) -> int:
            return 2

    def body() -> list[int]:
        (chunk,) = build_chunks(byte_gpt())
        with torch.no_grad():
            chunk.output_layer.weight[3:] = 100.0  # far more probable than any real token
        text = sample_text(chunk, Chatty(), "\x00", num_tokens=40, temperature=1.0)
        return list(text.encode())

    drawn = run_ranks(1, body)[0]
    assert set(drawn) <= {0, 1}
    assert len(drawn) < 40


@pytest.mark.parametrize("layout", ["pipeline_model_parallel_size", "context_parallel_size"])
def test_layouts_that_cannot_sample_are_rejected(layout: str) -> None:
    def body() -> None:
        (chunk,) = build_chunks(byte_gpt(**{layout: 2}))
        with pytest.raises(ValueError, match=layout.split("_")[0]):
            sample_text(chunk, ByteTokenizer(), "a")

    run_ranks(2, body)


def test_empty_prompt_is_rejected() -> None:
    def body() -> None:
        (chunk,) = build_chunks(byte_gpt())
        with pytest.raises(ValueError, match="prompt"):
            sample_text(chunk, ByteTokenizer(), "")

    run_ranks(1, body)
