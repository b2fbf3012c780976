"""Conversations to tokens: the tokens that count, and chat templates."""

from pathlib import Path
from typing import Any

import pytest

from bridge.gpt.data.sft.rendering import Renderer
from bridge.gpt.data.sft.rows.conversations import RowKeys, read_conversation
from bridge.gpt.data.tokenization.tokenizers import build_tokenizer
from bridge.training.config import TokenizerConfig
from sft_data import WORDS, chat, word_tokenizer

KEYS = RowKeys(prompt="prompt", completion="completion", messages="messages")
PAIR = {"prompt": "ab", "completion": "cd"}
TALK = chat("user: hi", "assistant: yes", "user: ho", "assistant: no")

# Each turn as `role text <eos>`.
STABLE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} <eos> {% endgeneration %}{% else %}{{ m['content'] }} . {% endif %}"
    "{% endfor %}"
)
# It omits the answers before the last one, as templates often omit reasoning.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }} "
    "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }} {% endif %}<eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
STRICT = "{{ raise_exception('no system turns here') }}"


def rendered(record: dict[str, Any], tokenizer: Any, **options: Any) -> list[tuple[int, bool]]:
    values = {"template": "plain", "loss_on": "assistant"} | options
    result = Renderer(build_tokenizer(tokenizer), **values)(read_conversation(record, "here", KEYS))
    return list(zip(result.ids, result.counts, strict=True))


def text_and_counted(pairs: list[tuple[int, bool]]) -> tuple[str, str]:
    """Return all bytes as text, with ``$`` for the end, and the bytes that count."""
    letters = [("$" if index == 256 else chr(index), counts) for index, counts in pairs]
    return "".join(c for c, _ in letters), "".join(c for c, counts in letters if counts)


def words_and_counted(pairs: list[tuple[int, bool]]) -> tuple[str, str]:
    words = [(WORDS[index], counts) for index, counts in pairs]
    return " ".join(w for w, _ in words), " ".join(w for w, counts in words if counts)


@pytest.mark.parametrize(
    ("record", "loss_on", "text", "counted"),
    [
        (PAIR, "assistant", "abcd$", "cd$"),
        (PAIR, "all", "abcd$", "abcd$"),
        (
            TALK,
            "assistant",
            "<|user|>\nhi\n<|assistant|>\nyes$<|user|>\nho\n<|assistant|>\nno$",
            "yes$no$",
        ),
        (
            chat("system: s", "user: hi", "assistant: yes", "user: ho", "assistant: no"),
            "answer",
            "<|system|>\ns\n<|user|>\nhi\n<|assistant|>\nyes$<|user|>\nho\n<|assistant|>\nno$",
            "no$",
        ),
    ],
)
def test_the_plain_template_and_the_tokens_that_count(
    record: Any, loss_on: str, text: str, counted: str
) -> None:
    assert text_and_counted(rendered(record, TokenizerConfig(), loss_on=loss_on)) == (text, counted)


def test_a_chat_without_an_answer_is_rejected_unless_all_counts() -> None:
    with pytest.raises(ValueError, match="here: no turn is the assistant's.*loss_on=all"):
        rendered(chat("user: hi"), TokenizerConfig())
    assert text_and_counted(rendered(chat("user: hi"), TokenizerConfig(), loss_on="all"))[1]


@pytest.mark.xdist_group("transformers")
def test_the_tokenizer_s_leading_token_is_added_once(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = word_tokenizer(tmp_path, None, begins=True)
    pair = {"prompt": "hi .", "completion": "yes"}
    assert words_and_counted(rendered(pair, tokenizer)) == ("<s> hi . yes <eos>", "yes <eos>")


@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize(
    ("template", "loss_on", "text", "counted"),
    [
        (
            STABLE,
            "assistant",
            "user hi <eos> assistant yes <eos> user ho <eos> assistant no <eos>",
            "yes <eos> no <eos>",
        ),
        (
            STABLE,
            "answer",
            "user hi <eos> assistant yes <eos> user ho <eos> assistant no <eos>",
            "no <eos>",
        ),
        (
            MARKED,
            "assistant",
            "user hi . assistant yes <eos> user ho . assistant no <eos>",
            "yes <eos> no <eos>",
        ),
        (
            MARKED,
            "answer",
            "user hi . assistant yes <eos> user ho . assistant no <eos>",
            "no <eos>",
        ),
        (
            FORGETFUL,
            "answer",
            "user hi <eos> assistant <eos> user ho <eos> assistant no <eos>",
            "no <eos>",
        ),
    ],
)
def test_the_tokenizer_s_chat_template(
    tmp_path: Path, template: str, loss_on: str, text: str, counted: str
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = word_tokenizer(tmp_path, template)
    pairs = rendered(TALK, tokenizer, template="tokenizer", loss_on=loss_on)
    assert words_and_counted(pairs) == (text, counted)
    whole = transformers.AutoTokenizer.from_pretrained(str(tmp_path)).apply_chat_template(
        TALK["messages"], tokenize=True, return_dict=True
    )
    assert [index for index, _ in pairs] == whole["input_ids"]


@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (FORGETFUL, "here: the tokenizer's chat template writes.*turn 1.*loss_on=answer"),
        (STRICT, "here: the tokenizer's chat template rejects it .no system turns here"),
        (None, "dataset.chat_template=tokenizer: the tokenizer has no chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_rejected(
    tmp_path: Path, template: str | None, complaint: str
) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=complaint):
        rendered(TALK, word_tokenizer(tmp_path, template), template="tokenizer")
