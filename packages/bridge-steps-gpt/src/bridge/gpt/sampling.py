"""Text from a trained model: short samples to read, without a key-value cache."""

from typing import Any

import torch

from bridge.gpt.data.tokenization.tokenizers import Tokenizer
from bridge.training.megatron_import import quiet_import
from bridge.training.usage_error import UsageError

with quiet_import():
    from megatron.core.utils import unwrap_model

_LENGTH_STEP = 32


def why_not_sampled(pg_collection: Any) -> str | None:
    """Return why `sample_text` does not support a model's process groups; None if it does."""
    if pg_collection.pp.size() > 1:
        return "sampling does not run under pipeline parallelism"
    if pg_collection.cp.size() > 1:
        return "sampling does not run under context parallelism"
    return None


@torch.no_grad()
def sample_text(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 1234,
) -> str:
    """Continue `prompt` by `num_tokens` tokens and return the new text without the prompt.

    The context, cut to the model's sequence length, is computed anew for every token. All tensor-
    and expert-parallel ranks must call it together, and all return the same text.

    Args:
        model: The only model chunk of this rank, wrapped for training or not.
        tokenizer: The tokenizer that the model was trained with.
        prompt: At least one token of text.
        num_tokens: Tokens to add; fewer if the document ends.
        temperature: Divides the logits; 0 takes the most probable token.
        seed: Seed of the draws.

    Raises:
        UsageError: The prompt is empty, or the parallel layout is not supported.
    """
    chunk = unwrap_model(model)
    reason = why_not_sampled(chunk.pg_collection)
    if reason is not None:
        raise UsageError(reason)
    ids = tokenizer.tokenize(prompt)
    if not ids:
        raise UsageError("sample_text: the prompt holds no token; give at least one")
    generator = torch.Generator().manual_seed(seed)
    start = len(ids)
    was_training = model.training
    model.eval()
    try:
        for _ in range(num_tokens):
            logits = _next_token_logits(model, chunk, ids, tokenizer.vocab_size)
            token = _draw_token(logits, temperature, generator)
            if token == tokenizer.eod:
                break
            ids.append(token)
    finally:
        model.train(was_training)
    return tokenizer.detokenize(ids[start:])


def _next_token_logits(
    model: torch.nn.Module, chunk: Any, ids: list[int], vocab_size: int
) -> torch.Tensor:
    """Return the logits after the last of `ids`, on the host, without the padded vocabulary."""
    window = ids[-chunk.max_sequence_length :]
    # Few different lengths, since each has its own rotary embedding; under sequence parallelism a
    # multiple of the ranks. Tokens to the right of the last do not change its logits.
    step = _LENGTH_STEP * chunk.config.tensor_model_parallel_size
    length = min(-(-len(window) // step) * step, chunk.max_sequence_length)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    tokens[0, : len(window)] = torch.tensor(window)
    device = torch.cuda.current_device()
    logits = model(
        input_ids=tokens.to(device),
        position_ids=torch.arange(length, device=device).unsqueeze(0),
        attention_mask=None,
        runtime_gather_output=True,
    )
    last: torch.Tensor = logits[0, len(window) - 1, :vocab_size]
    return last.float().cpu()


def _draw_token(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
