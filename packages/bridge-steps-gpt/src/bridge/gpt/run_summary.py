"""The last lines of a run of gpt-tiny: a sampled text, and the loss next to that of bigrams."""

from typing import Any, override

from torch.utils.data import Subset

from bridge.gpt.bigram_entropy import bigram_entropy_of
from bridge.gpt.data.tokenization.tokenizers import build_tokenizer
from bridge.gpt.sampling import sample_text, why_not_sampled
from bridge.training.callbacks import Callback, CallbackContext
from bridge.training.model.ddp import parameters_in_sync
from bridge.training.ranks.launcher_store import is_logging_rank

_PROMPT_TOKENS = 48


class RunSummary(Callback):
    """Adds a sampled text, and loss and bigram entropy, to the summary of a finished run.

    The bigram entropy of each validation set is that of the samples of its loss. A run without a
    validation result gets no such lines.

    Args:
        num_tokens: Length of the sampled text.
    """

    def __init__(self, num_tokens: int = 160) -> None:
        self._num_tokens = num_tokens

    @override
    def on_train_end(self, context: CallbackContext) -> None:
        """Append the lines, unless the run failed or has no validation result."""
        if context.exception is not None or context.data is None:
            return
        losses = {
            name: context.validation.get(f"{name}/lm loss".removeprefix("validation/"))
            for name in context.data.sets("validation")
        }
        found = {name: loss for name, loss in losses.items() if loss is not None}
        if not found:
            return
        self._add_sample(context, context.data.set_named(next(iter(found))))
        if not is_logging_rank():
            return
        unit = "byte" if _tokenizer_type(context) == "bytes" else "token"
        for name, loss in found.items():
            validation: Any = context.data.set_named(name)
            samples = context.data.evaluation_samples(validation)
            bigram = bigram_entropy_of(Subset(validation, range(samples)))
            context.summary.append(f"{name} {loss:.3f} nats/{unit}, bigram {bigram:.3f}")

    def _add_sample(self, context: CallbackContext, validation: Any) -> None:
        """Append a continuation of the beginning of the validation data; every rank calls it."""
        reason = why_not_sampled(context.pg_collection)
        if reason is not None:
            context.summary.append(f"no sampled text: {reason}")
            return
        if _tokenizer_type(context) is None:
            return
        assert context.config.tokenizer is not None
        tokenizer = build_tokenizer(context.config.tokenizer)
        tokens = validation[0]["tokens"][:_PROMPT_TOKENS].tolist()
        prompt = tokenizer.detokenize(tokens)
        with parameters_in_sync(context.model):
            text = sample_text(
                context.model[0],
                tokenizer,
                prompt,
                num_tokens=self._num_tokens,
                seed=context.config.rng.seed,
            )
        context.summary.append(
            f"sampled text, continuing the first {len(tokens)} tokens of the validation data:"
        )
        context.summary.extend(f"  | {line}" for line in _printable(prompt + text).splitlines())


def _tokenizer_type(context: CallbackContext) -> str | None:
    tokenizer = context.config.tokenizer
    return None if tokenizer is None or tokenizer.type == "null" else tokenizer.type


def _printable(text: str) -> str:
    """Return a text with control characters replaced, which could change the terminal."""
    replacement = "\N{REPLACEMENT CHARACTER}"
    return "".join(c if c.isprintable() or c in "\n\t" else replacement for c in text)
