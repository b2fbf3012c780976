"""SFT examples, and Hugging Face tokenizers whose tokens are words or letters."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bridge.training.config import TokenizerConfig

WORDS = ("<eos>", "<unk>", "<s>", "user", "assistant", "system", "hi", "ho", "yes", "no", ".")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def uneven_rows(count: int) -> list[dict[str, str]]:
    """Return prompts and completions of many different lengths."""
    return [
        {"prompt": "p" * (1 + 7 * n % 9), "completion": "abc"[n % 3] * (1 + 5 * n % 11)}
        for n in range(count)
    ]


def chat(*turns: str) -> dict[str, Any]:
    """Return an example of a chat from ``role: text``."""
    pairs = [turn.partition(": ") for turn in turns]
    return {"messages": [{"role": role, "content": text} for role, _, text in pairs]}


def word_tokenizer(
    directory: Path, template: str | None, *, begins: bool = False, pad: str | None = None
) -> Any:
    """Write a tokenizer of `WORDS` with a chat template; return its section.

    With `begins` it puts ``<s>`` before a text by itself. `pad` is its pad token.
    """
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary[word], "content": word, "special": True, **special}
            for word in ("<eos>", "<unk>", "<s>")
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    if begins:
        first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocabulary["<s>"]], "tokens": ["<s>"]}},
        }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "<eos>",
        "chat_template": template,
        **({} if pad is None else {"pad_token": pad}),
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return TokenizerConfig(type="huggingface", model=str(directory))


CONTROL = ("<eos>", "<|im_start|>", "<|im_end|>", "</s>", "<pad>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


def letter_tokenizer(directory: Path, template: str | None, *, like: str = "gpt2") -> Any:
    """Write a tokenizer of letters and a few longer tokens, with `CONTROL`; return its section.

    Like "gpt2" it is of bytes, like "llama" it marks the beginning of a text as that of a word, and
    like "phi" its ``<|im_end|>`` takes white space behind it in.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "▁" if like == "llama" else "Ġ"
    merges = [(space, "<"), ("<", "|"), ("|", ">"), ("s", "e"), ("se", "r"), ("a", "s")]
    tokens = dict.fromkeys([*letters, "▁", "\n", *(a + b for a, b in merges)])
    model = models.BPE({token: number for number, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    if like == "llama":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, rstrip=like == "phi" and t == "<|im_end|>") for t in CONTROL]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return TokenizerConfig(type="huggingface", model=str(directory))
