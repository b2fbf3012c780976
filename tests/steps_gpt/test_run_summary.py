import math
from collections import Counter
from pathlib import Path
from typing import Any, override

from bridge.gpt.recipes import gpt_tiny
from bridge.gpt.run_summary import RunSummary
from bridge.training.callbacks import Callback, CallbackContext
from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from gpt_data import write_story
from ranks import run_ranks


class Listener(Callback):
    """Keeps the lines of the summary, and the evaluated samples."""

    @override
    def on_train_end(self, context: CallbackContext) -> None:
        assert context.data is not None
        self.summary = list(context.summary)
        validation: Any = context.data.splits.validation
        samples = 0 if validation is None else context.data.evaluation_samples(validation)
        self.rows = [validation[i] for i in range(samples)]


def two_steps(
    directory: Path, eval_iters: int = 2, **layout: int
) -> tuple[list[str], float, float]:
    """Train gpt-tiny for two steps; return its summary, validation loss and bigram entropy."""
    config: Any = gpt_tiny()
    for name, value in layout.items():
        setattr(config.model, name, value)
    config.model.seq_length = 32
    config.train.train_iters = 2
    config.validation.eval_iters = eval_iters
    config.dataset.path = str(directory / "story.txt")
    config.dataset.split = "80,20,0"
    config.dataset.cache_dir = str(directory / "cache")
    config.checkpoint.run_dir = str(directory / "run")
    config.checkpoint.save_at_end = False
    listener = Listener()
    result = pretrain(config, forward_step, callbacks=[RunSummary(num_tokens=8), listener])
    return listener.summary, result.validation.get("lm loss") or 0.0, bigram(listener.rows)


def bigram(rows: list[Any]) -> float:
    """Return the entropy of a byte given the one before: H(pairs) - H(first bytes)."""
    pairs = [
        pair
        for row in rows
        for pair in zip(row["tokens"].tolist(), row["labels"].tolist(), strict=True)
    ]
    return entropy(Counter(pairs)) - entropy(Counter(first for first, _ in pairs))


def entropy(counts: Counter[Any]) -> float:
    total = counts.total()
    return 0.0 - sum(n / total * math.log(n / total) for n in counts.values())


def test_last_line_compares_the_validation_loss_with_bigrams(tmp_path: Path) -> None:
    write_story(tmp_path / "story.txt", paragraphs=600)
    ((summary, loss, expected),) = run_ranks(1, two_steps, tmp_path, process_group=False)
    assert summary[-1] == f"validation {loss:.3f} nats/byte, bigram {expected:.3f}"
    assert summary[0].startswith("sampled text")
    assert summary[1].startswith("  | ")


def test_layout_that_cannot_sample_is_named_in_place_of_the_text(tmp_path: Path) -> None:
    write_story(tmp_path / "story.txt", paragraphs=600)

    def body() -> list[str]:
        return two_steps(tmp_path, pipeline_model_parallel_size=2)[0]

    first, _ = run_ranks(2, body, process_group=False)
    assert first[0] == "no sampled text: sampling does not run under pipeline parallelism"
    assert first[1].startswith("validation ")


def test_run_without_evaluation_adds_no_line(tmp_path: Path) -> None:
    write_story(tmp_path / "story.txt", paragraphs=600)
    ((summary, _, _),) = run_ranks(1, two_steps, tmp_path, 0, process_group=False)
    assert summary == []
