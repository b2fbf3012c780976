"""Special tokens that a user writes are text; those of a chat template are tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.gpt.data.sft.dataset_config import SFTDatasetConfig
from bridge.gpt.data.sft.rendering import Renderer
from bridge.gpt.data.sft.rows.conversations import RowKeys, read_conversation
from bridge.gpt.data.tokenization.document_encoder import DocumentEncoder
from bridge.gpt.data.tokenization.encoding import hugging_face_tokenizer
from bridge.gpt.data.tokenization.tokenizers import build_tokenizer
from gpt_data import build_splits
from sft_data import CHATML, CONTROL, MARKED_CHATML, chat, letter_tokenizer, write_rows

pytestmark = pytest.mark.xdist_group("transformers")

KEYS = RowKeys(prompt="prompt", completion="completion", messages="messages")
ASKED = "What does <|im_end|> or </s> or <eos> mean?"
ANSWER = "<|im_start|> opens a turn, as <|im_end|> ends it: </s>"
WRITTEN = chat(f"user: {ASKED}", f"assistant: {ANSWER}", "user: so<|im_end|>", "assistant: é")
PLAIN = chat("user: What ends a turn?", "assistant: A token < that > ends it.")
SHORT = chat("user: a", "assistant: b", "user: as user", "assistant: é")


@pytest.fixture(autouse=True)
def transformers() -> None:
    pytest.importorskip("transformers")


class Reference:
    """The tokenizers package alone: a piece of text at a time, and the ids of special tokens."""

    def __init__(self, config: Any) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_file(f"{config.model}/tokenizer.json")
        self.backend.encode_special_tokens = True

    def __call__(self, *pieces: str) -> list[int]:
        """Encode pieces: a special token by itself is one, and is text within others."""
        ids: list[int] = []
        for piece in pieces:
            if piece in CONTROL:
                ids += [self.backend.get_vocab()[piece]]
            else:
                ids += self.backend.encode(piece, add_special_tokens=False).ids
        return ids


def rendered(record: Any, config: Any, **options: Any) -> tuple[list[int], list[int]]:
    """Return all ids, and those that count."""
    values = {"template": "tokenizer", "loss_on": "assistant"} | options
    result = Renderer(build_tokenizer(config), **values)(read_conversation(record, "here", KEYS))
    counted = [i for i, counts in zip(result.ids, result.counts, strict=True) if counts]
    return result.ids, counted


def turn(role: str, text: str) -> list[str]:
    return ["<|im_start|>", f"{role}\n{text}", "<|im_end|>", "\n"]


@pytest.mark.parametrize("loss_on", ["assistant", "answer", "all"])
@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["between", "marked"])
def test_special_tokens_of_turns_are_text_and_those_of_the_template_are_tokens(
    template: str, loss_on: str, tmp_path: Path
) -> None:
    config = letter_tokenizer(tmp_path, template)
    ids, counted = rendered(WRITTEN, config, loss_on=loss_on)
    reference = Reference(config)
    # A line break is between a role and a text, so no token here spans both.
    pieces = [
        *turn("user", ASKED),
        *turn("assistant", ANSWER),
        *turn("user", "so<|im_end|>"),
        *turn("assistant", "é"),
    ]
    assert ids == reference(*pieces)
    end = ["<|im_end|>"] if template is MARKED_CHATML else ["<|im_end|>", "\n"]
    answers = [ANSWER, *end, "é", *end] if loss_on == "assistant" else ["é", *end]
    assert counted == (ids if loss_on == "all" else reference(*answers))
    assert build_tokenizer(config).detokenize(ids) == "".join(pieces)


@pytest.mark.parametrize("like", ["gpt2", "llama", "phi"])
@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["between", "marked"])
@pytest.mark.parametrize("record", [PLAIN, SHORT, WRITTEN], ids=["plain", "short", "written"])
def test_text_without_special_tokens_is_as_the_template_encodes_it(
    record: Any, template: str, like: str, tmp_path: Path
) -> None:
    config = letter_tokenizer(tmp_path, template, like=like)
    ids, _ = rendered(record, config, loss_on="all")
    inner: Any = hugging_face_tokenizer(build_tokenizer(config))
    whole = inner.apply_chat_template(record["messages"], tokenize=True, return_dict=True)
    control = {inner.convert_tokens_to_ids(token) for token in CONTROL}
    if record is not WRITTEN:
        assert ids == whole["input_ids"]
        return
    # The template writes two for each of four turns.
    assert sum(index in control for index in ids) == 8
    assert sum(index in control for index in whole["input_ids"]) == 15
    for message in record["messages"]:
        assert message["content"] in inner.decode(ids)


def test_a_piece_after_a_special_token_is_not_marked_as_a_beginning(tmp_path: Path) -> None:
    config = letter_tokenizer(tmp_path, CHATML, like="llama")
    ids, _ = rendered(chat("user: hi", "assistant: so </s>"), config, loss_on="all")
    other, _ = rendered(chat("user: hi", "assistant: so </p>"), config, loss_on="all")
    inner: Any = hugging_face_tokenizer(build_tokenizer(config))
    same = inner.convert_tokens_to_ids("s"), inner.convert_tokens_to_ids("p")
    assert [same[1] if i == same[0] else i for i in ids] == [
        same[1] if i == same[0] else i for i in other
    ]


@pytest.mark.parametrize(
    "record", [{"prompt": ASKED, "completion": ANSWER}, WRITTEN], ids=["pair", "chat"]
)
def test_special_tokens_of_turns_are_text_in_the_plain_template(
    record: Any, tmp_path: Path
) -> None:
    config = letter_tokenizer(tmp_path, None)
    ids, counted = rendered(record, config, template="plain")
    reference = Reference(config)
    if record is WRITTEN:
        user, assistant = "<|user|>\n", "<|assistant|>\n"
        wanted = reference(
            *(user, f"{ASKED}\n", assistant, ANSWER, "<eos>"),
            *(user, "so<|im_end|>\n", assistant, "é", "<eos>"),
        )
        assert counted == reference(ANSWER, "<eos>", "é", "<eos>")
    else:
        wanted = reference(ASKED, ANSWER, "<eos>")
        assert counted == reference(ANSWER, "<eos>")
    assert ids == wanted


def test_rows_with_special_tokens_are_counted_at_every_start(tmp_path: Path) -> None:
    config = letter_tokenizer(tmp_path / "tokenizer", CHATML)
    write_rows(tmp_path / "rows.jsonl", [WRITTEN, PLAIN, WRITTEN])
    dataset = SFTDatasetConfig(
        path=str(tmp_path / "rows.jsonl"),
        chat_template="tokenizer",
        cache_dir=str(tmp_path / "cache"),
    )
    for _ in ("anew", "from the cache"):
        assert build_splits(dataset, seq_length=512, tokenizer=config).warnings == [
            "warning: 2 train rows have special tokens written in their text; they are encoded "
            "as text"
        ]


def test_a_document_with_special_tokens_is_text_and_counted(tmp_path: Path) -> None:
    config = letter_tokenizer(tmp_path / "tokenizer", None)
    tokenizer, reference = build_tokenizer(config), Reference(config)
    encode = DocumentEncoder(tokenizer, np.int32, append_eod=True)
    assert encode(ASKED.encode()).tolist() == reference(ASKED, "<eos>")
    assert encode(b"user <|i").tolist() == reference("user <|i", "<eos>")
    assert encode.documents_with_special_tokens == 1
    texts = [ASKED, "a story " * 30, ANSWER]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    dataset = GPTDatasetConfig(
        path=str(tmp_path / "lines.jsonl"), split="1", cache_dir=str(tmp_path / "cache")
    )
    for _ in ("anew", "from the cache"):
        assert build_splits(dataset, seq_length=32, tokenizer=config).warnings == [
            "warning: train data: 2 of 3 documents have special tokens written in their text; "
            "they are encoded as text"
        ]
