import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.gpt.data.tokenization.document_encoder import DocumentEncoder
from bridge.gpt.data.tokenization.tokenizers import (
    END_OF_DOCUMENT,
    build_tokenizer,
    tokenizer_identity,
    tokenizer_vocab_size,
)
from bridge.training.config import TokenizerConfig
from bridge.training.usage_error import UsageError


def test_the_byte_tokenizer_decodes_exactly_what_it_encoded() -> None:
    tokenizer = build_tokenizer(TokenizerConfig())
    text = "\n tab\t e\u0301 \u20ac \0 \n\n"
    ids = tokenizer.tokenize(text)
    assert ids == list(text.encode())
    assert tokenizer.detokenize([*ids, END_OF_DOCUMENT]) == text
    assert tokenizer.detokenize([0xE2, 0x82]) == "\ufffd"


def test_the_byte_tokenizer_reserves_no_byte() -> None:
    tokenizer = build_tokenizer(TokenizerConfig())
    assert tokenizer.vocab_size == tokenizer_vocab_size(TokenizerConfig()) == 257
    assert tokenizer.eod == 256
    # megatron-core masks labels that equal the padding.
    assert tokenizer.pad not in range(257)  # type: ignore[attr-defined]


def test_the_null_tokenizer_has_the_given_size() -> None:
    config = TokenizerConfig(type="null", vocab_size=1000)
    assert build_tokenizer(config).vocab_size == tokenizer_vocab_size(config) == 1000
    with pytest.raises(
        ValueError, match=r"tokenizer\.vocab_size=None.*tokenizer\.vocab_size=32000"
    ):
        tokenizer_vocab_size(TokenizerConfig(type="null"))


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "tiktoken"])
def test_a_missing_model_is_an_error_that_names_the_path(kind: str, tmp_path: Path) -> None:
    for model in (None, str(tmp_path / "absent")):
        config = TokenizerConfig(type=kind, model=model)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"tokenizer\.model") as error:
            build_tokenizer(config)
        assert model is None or model in str(error.value)


@pytest.mark.parametrize(
    ("kind", "content", "complaint"),
    [
        (
            "huggingface",
            b"\x1f\x8b\x08",
            "is a gzip file, and .*=huggingface reads the folder that",
        ),
        ("huggingface", b"{}", "is text, and tokenizer.type=huggingface reads the folder that"),
        ("tiktoken", b"\n\x0e\n\0<unk>", "is binary data, and tokenizer.type=tiktoken reads JSON"),
        ("sentencepiece", b"{}", "is text, and .* reads a sentencepiece model; set the type"),
        ("sentencepiece", b"PK\x03\x04\0", "is a zip archive .*reads a sentencepiece model"),
    ],
)
def test_a_file_of_another_kind_is_rejected_by_its_kind(
    kind: Any, content: bytes, complaint: str, tmp_path: Path
) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.model='.*': {complaint}"):
        tokenizer_identity(TokenizerConfig(type=kind, model=str(model)))


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("huggingface", "transformers"),
        ("sentencepiece", "sentencepiece"),
        ("tiktoken", "tiktoken"),
    ],
)
def test_a_missing_library_is_an_error_with_the_install_command(
    kind: str, module: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"\n\0" if kind == "sentencepiece" else b"[]")
    model = tmp_path if kind == "huggingface" else model
    with pytest.raises(ValueError, match=f"pip install {module}"):
        build_tokenizer(TokenizerConfig(type=kind, model=str(model)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "content"), [("sentencepiece", b"\n\x0e\0abc\xff"), ("tiktoken", b'{"a": 1}')]
)
def test_a_tokenizer_file_that_its_library_cannot_load_is_the_users_mistake(
    kind: Any, content: bytes, tmp_path: Path
) -> None:
    pytest.importorskip(kind)
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(UsageError, match=f"tokenizer.model='.*': {kind} cannot load it"):
        build_tokenizer(TokenizerConfig(type=kind, model=str(tmp_path / "model")))


def test_a_tiktoken_file_tokenizes_and_has_its_own_size(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    import base64

    tokens = [bytes([value]) for value in range(256)] + [b"th", b"the"]
    entries = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for rank, token in enumerate(tokens)
    ]
    model = tmp_path / "vocab.json"
    model.write_text(json.dumps(entries))
    config = TokenizerConfig(type="tiktoken", model=str(model))
    tokenizer = build_tokenizer(config)
    assert tokenizer_vocab_size(config) == 1000 + 258
    assert tokenizer.tokenize("the") == [1000 + 257]
    assert tokenizer.detokenize(tokenizer.tokenize("other words")) == "other words"
    # An end-of-document token that is written in a document is text.
    assert tokenizer.tokenize("</s>") == [tokenizer.eod]
    encode = DocumentEncoder(tokenizer, np.int32, append_eod=True)
    assert encode(b"</s>").tolist() == [*(1000 + value for value in b"</s>"), tokenizer.eod]
    assert encode.documents_with_special_tokens == 1


def test_a_sentencepiece_model_tokenizes(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn", "more words to learn"] * 20),
        model_prefix=str(tmp_path / "words"),
        vocab_size=17,
        minloglevel=2,
    )
    config = TokenizerConfig(type="sentencepiece", model=str(tmp_path / "words.model"))
    tokenizer = build_tokenizer(config)
    assert tokenizer_vocab_size(config) == 17
    assert tokenizer.detokenize(tokenizer.tokenize("some more words")) == "some more words"
    assert tokenizer.eod == 2
    assert tokenizer.eod not in DocumentEncoder(tokenizer, np.int32, append_eod=False)(
        b"some </s> words"
    )


@pytest.mark.xdist_group("transformers")
def test_a_hugging_face_directory_tokenizes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    _write_hugging_face(tmp_path, eos="<eos>")
    config = TokenizerConfig(type="huggingface", model=str(tmp_path))
    tokenizer = build_tokenizer(config)
    assert tokenizer.tokenize("a b") == [1, 2]
    assert tokenizer.eod == 0
    assert tokenizer_vocab_size(config) == 4


@pytest.mark.xdist_group("transformers")
def test_a_tokenizer_without_an_end_token_is_rejected(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    _write_hugging_face(tmp_path, eos=None)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        build_tokenizer(TokenizerConfig(type="huggingface", model=str(tmp_path)))


def _write_hugging_face(directory: Path, *, eos: str | None) -> None:
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {"<eos>": 0, "a": 1, "b": 2, "<unk>": 3},
            "unk_token": "<unk>",
        },
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    if eos is not None:
        settings["eos_token"] = eos
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_with_code_is_rejected_with_advice_that_has_a_setting(
    tmp_path: Path, file: str
) -> None:
    pytest.importorskip("transformers")
    code = {"auto_map": {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.OwnConfig"}}
    (tmp_path / file).write_text(json.dumps(code))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    config = TokenizerConfig(type="huggingface", model=str(tmp_path))
    with pytest.raises(UsageError, match=rf"is Python code .* \(auto_map in .*/{file}\)") as error:
        build_tokenizer(config)
    assert "trust" not in str(error.value)
    assert not (tmp_path / "marker").exists()
    (tmp_path / file).write_text("{}")
    with pytest.raises(
        UsageError, match="tokenizer.model=.*: transformers cannot load it"
    ) as error:
        build_tokenizer(config)
    assert "\n" not in str(error.value)


def test_the_identity_changes_with_the_tokenizer_s_files(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"\n\0one")
    config = TokenizerConfig(type="sentencepiece", model=str(model))
    before = tokenizer_identity(config)
    assert tokenizer_identity(config) == before
    model.write_bytes(b"\n\0another")
    assert tokenizer_identity(config) != before


def test_documents_end_with_the_end_of_document_token_unless_turned_off() -> None:
    tokenizer = build_tokenizer(TokenizerConfig())
    for append, expected in ((True, [97, 255, 256]), (False, [97, 255])):
        tokens = DocumentEncoder(tokenizer, np.uint16, append_eod=append)(b"a\xff")
        assert tokens.tolist() == expected
        assert tokens.dtype == np.uint16


class _Words:
    vocab_size = 10
    eod = 9

    def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def detokenize(self, ids: list[int]) -> str:
        return str(ids)


def test_wrong_utf8_is_repaired_and_counted_for_tokenizers_of_text() -> None:
    encode = DocumentEncoder(_Words(), np.int32, append_eod=True)
    assert encode(b"two words").tolist() == [3, 5, 9]
    assert encode.repaired_documents == 0
    assert encode(b"bad \xff\xfe").tolist() == [3, 2, 9]
    assert encode.repaired_documents == 1
